"""Mixtures of experts: against a plain loop, and over a mesh against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.models.config import ModelConfig
from gvpo_jax.models.decoder import DecoderConfig, init_params
from gvpo_jax.models.shape import Experts
from gvpo_jax.ops.experts import experts_on, mixture, of_tokens, weights_gradient_on_tpu
from gvpo_jax.parallel.layout import place_batch, place_params, shardings
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.training.step import token_logps

RNG = np.random.default_rng(0)
E, C, D, F = 4, 2, 6, 10
WEIGHTS = [RNG.normal(size=shape).astype(np.float32) for shape in ((E, D, F), (E, D, F), (E, F, D))]
CONFIG = DecoderConfig(
    "qwen3_moe", 62, 16, 24, 1, 4, 2, 4, qk_norm=True, experts=Experts(E, C, 12, normalised=True)
)


def tokens(*shape):
    """With experts that differ, one of them never chosen, and shares."""
    chosen = np.stack([RNG.choice([0, 2, 3], C, replace=False) for _ in range(np.prod(shape))])
    x, shares = RNG.normal(size=(*shape, D)), RNG.uniform(size=(*shape, C))
    return jnp.asarray(x, jnp.float32), chosen.reshape(*shape, C), jnp.asarray(shares, jnp.float32)


def test_each_token_gets_the_sum_of_its_experts():
    x, chosen, shares = tokens(9)
    chosen[4, 1] = E  # none
    expected = np.zeros((9, D))
    gate, up, down = WEIGHTS
    for i, c in np.ndindex(9, C):
        if (e := chosen[i, c]) < E:
            inner = np.tanh(x[i] @ gate[e]) * (x[i] @ up[e])
            expected[i] += shares[i, c] * (inner @ down[e])
    out = mixture(x, chosen, shares, *map(jnp.asarray, WEIGHTS), activation=jnp.tanh)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_what_lies_behind_the_last_experts_rows_touches_nothing(monkeypatch):
    """As on a TPU, where those rows hold anything; by value and by gradient."""
    x, chosen, shares = tokens(9)
    chosen[[1, 4], 1] = E

    def value(x, shares, *weights):
        out = mixture(x, chosen, shares, *weights, activation=jnp.tanh)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    arguments = x, shares, *map(jnp.asarray, WEIGHTS)
    expected = jax.jit(jax.value_and_grad(value, tuple(range(5))))(*arguments)
    product = jax.lax.ragged_dot

    def with_nan(rows, weights, sizes):
        counted = jnp.arange(len(rows))[:, None] < jnp.sum(sizes)
        return jnp.where(counted, product(rows, weights, sizes), jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_dot", with_nan)
    found = jax.jit(jax.value_and_grad(value, tuple(range(5))))(*arguments)
    # Sums of many products in float32, which two versions of XLA add in different orders.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("sizes", [(3, 0, 290, 2), (0, 0, 0, 0)])
def test_the_tpu_kernel_gives_the_gradient_of_the_weights(sizes):
    """Rows of one expert in two blocks, of several in one, an expert without rows, rows of none."""
    rows, grad = RNG.normal(size=(300, D)), RNG.normal(size=(300, F))
    rows[sum(sizes) :] = np.nan
    expected, start = np.zeros((E, D, F)), 0
    for e, size in enumerate(sizes):
        expected[e] = rows[start : start + size].T @ grad[start : start + size]
        start += size
    arrays = jnp.asarray(rows, jnp.float32), jnp.asarray(grad, jnp.float32), jnp.asarray(sizes)
    found = weights_gradient_on_tpu(*arrays, interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 4)])
def test_experts_over_a_mesh_give_the_same(sizes):
    data, fsdp, tensor = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor).mesh(jax.devices()[: np.prod(sizes)])
    x, chosen, shares = tokens(2, 2, 3)

    def value(run, x, shares, *weights):
        out = run(x, chosen, shares, *weights, activation=jnp.tanh)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    arguments = x, shares, *map(jnp.asarray, WEIGHTS)
    here, there = (
        jax.jit(jax.value_and_grad(functools.partial(value, run), tuple(range(5))))(*arguments)
        for run in (of_tokens, experts_on(mesh))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5), here, there)


def test_a_model_of_experts_over_a_mesh_scores_the_same():
    params = init_params(CONFIG, 0)
    arrays = {
        "prompts": RNG.integers(0, 61, (4, 5)),
        "prompt_lengths": np.array([5, 2, 3, 4]),
        "completions": RNG.integers(0, 61, (4, 2, 6)),
    }
    found = []
    for mesh in (MeshConfig(fsdp=1).mesh(jax.devices()[:1]), MeshConfig(fsdp=2, tensor=2).mesh()):
        model = ModelConfig().functions(CONFIG, mesh, "model")
        placed = place_batch(mesh, arrays, 2)

        def loss(params, model=model, placed=placed):
            return jnp.mean(token_logps(model, params, **placed))

        found.append(jax.jit(jax.value_and_grad(loss))(place_params(mesh, params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5), *found)


def test_experts_that_do_not_divide_over_the_mesh_are_refused():
    mesh = MeshConfig(fsdp=1, tensor=8).mesh()
    with pytest.raises(UserError, match=r"experts/down/kernel .* tensor=8; choose a size that div"):
        shardings(mesh, {"experts": {"down": {"kernel": np.ones((4, 8, 8))}}})
