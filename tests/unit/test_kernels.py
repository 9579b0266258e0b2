"""What each kind of hardware computes against the plain way: splash interpreted, cuDNN's shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.models import rope
from gvpo_jax.models.decoder import DecoderConfig, DecoderOptions, decoder_fns, init_params
from gvpo_jax.models.rope import rotations
from gvpo_jax.ops import kernels
from gvpo_jax.ops.attention import Prefix, causal
from gvpo_jax.ops.cpu import on_cpu, product_on
from gvpo_jax.ops.kernels import attention_on, on_gpu, on_tpu
from gvpo_jax.parallel.mesh import MeshConfig

G, K, H, N, D = 2, 2, 4, 2, 16


def inputs(t, p, dtype=jnp.float32, g=G, k=K):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    prefix = None
    if p:
        counts = np.arange(p) < np.linspace(1, p, g).astype(int)[:, None]
        prefix = Prefix(normal(g, N, p, D), normal(g, N, p, D), jnp.asarray(counts))
    return normal(g, k, t, H, D), normal(g, k, N, t, D), normal(g, k, N, t, D), prefix


def value_and_gradients(attention, arrays):
    """Of a sum that weighs every number differently."""
    *own, prefix = arrays

    def total(own, shared):
        whole = None if prefix is None else prefix._replace(keys=shared[0], values=shared[1])
        out = attention(*own, whole)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    shared = () if prefix is None else (prefix.keys, prefix.values)
    (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(own, shared)
    return out, grads


def assert_same(attention, arrays, tolerance, **limits):
    out, grads = value_and_gradients(functools.partial(attention, **limits), arrays)
    expected_out, expected = value_and_gradients(functools.partial(causal, **limits), arrays)
    assert out.dtype == expected_out.dtype
    for a, b in zip(
        jax.tree.leaves((out, grads)), jax.tree.leaves((expected_out, expected)), strict=True
    ):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("t", "p"), [(130, 0), (7, 9), (130, 140), (530, 0)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_splash_gives_the_same_numbers(t, p, sizes):
    """In one block and in several, with and without a prompt, also cut over devices."""
    data, fsdp, tensor = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor).mesh()
    splash = functools.partial(on_tpu, mesh, interpret=True)
    assert_same(splash, inputs(t, p, g=2 if sizes == (1, 1, 1) else 4), 1e-5)


@pytest.mark.parametrize("p", [0, 6, 9])
def test_what_cudnn_is_given_means_the_same(p):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).mesh()
    cudnn = functools.partial(on_gpu, mesh, implementation="xla")
    assert_same(cudnn, inputs(7, p, g=4), 1e-5)


@pytest.mark.parametrize("limits", [{"window": 5}, {"window": 5, "cap": 3.0}, {"window": 400}])
def test_all_of_them_know_windows_and_caps(limits):
    mesh = MeshConfig(fsdp=2).mesh(jax.devices()[:2])
    cudnn = functools.partial(on_gpu, mesh, implementation="xla")
    parts = functools.partial(on_cpu, mesh, at_once=0)
    splash = functools.partial(on_tpu, mesh, interpret=True)
    for attention, t, p in ((cudnn, 7, 9), (parts, 7, 9), (splash, 7, 9), (splash, 300, 140)):
        assert_same(attention, inputs(t, p), 1e-5, **limits)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU with cuDNN")
@pytest.mark.parametrize(("t", "p"), [(7, 0), (64, 32), (7, 9)])
def test_cudnn_gives_the_same_numbers(t, p):
    assert_same(
        functools.partial(on_gpu, MeshConfig(fsdp=1).mesh()), inputs(t, p, jnp.bfloat16), 2e-2
    )


@pytest.mark.parametrize(("t", "p"), [(7, 0), (130, 9)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_part_by_part_gives_the_same_numbers(t, p, sizes):
    data, fsdp, tensor = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor).mesh()
    parts = functools.partial(on_cpu, mesh, at_once=0)
    assert_same(parts, inputs(t, p, g=2 if sizes == (1, 1, 1) else 4), 1e-5)


def test_part_by_part_takes_the_memory_of_one_part():
    mesh, (*own, prefix) = MeshConfig(fsdp=1).mesh(), inputs(256, 64)
    scores = 4 * G * K * H * 256 * (256 + 64)

    def temporaries(at_once):
        def total(own):
            return jnp.sum(on_cpu(mesh, *own, prefix, at_once=at_once))

        compiled = jax.jit(jax.grad(total)).lower(own).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(scores - 1) < 0.5 * temporaries(scores)


@pytest.mark.parametrize(("wide", "out"), [(8, 24), (24, 8), (16, 16)])
def test_products_with_weights_are_products(wide, out):
    """And so are their gradients, whichever factor is the narrower one."""
    rng = np.random.default_rng(0)
    x, w, d = (rng.normal(size=s) for s in ((2, 3, 5, wide), (wide, out), (2, 3, 5, out)))
    dimensions = (((3,), (0,)), ((), ()))
    product = functools.partial(product_on(MeshConfig(fsdp=1).mesh()), dimension_numbers=dimensions)
    got, backward = jax.vjp(lambda *both: product(*both), *map(jnp.float32, (x, w)))
    d_x, d_w = backward(jnp.float32(d))
    np.testing.assert_allclose(got, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, d @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w, np.einsum("abcd,abcf->df", x, d), rtol=1e-5, atol=1e-5)


def test_products_with_weights_are_what_dots_keeps():
    """`remat=dots` computes none of them again, here as where JAX knows them by itself."""
    config = DecoderConfig("llama", 32, 16, 24, 1, 2, 1, 8, tie_embeddings=True)
    arrays = (np.ones((1, 3), int), np.full(1, 3), np.ones((1, 2, 4), int))

    def products(remat):
        product = product_on(MeshConfig(fsdp=1).mesh())
        apply = decoder_fns(config, DecoderOptions(remat=remat, product=product))
        total = lambda params: apply.completion_hidden(params, *arrays).sum()  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(total))(init_params(config, 0)))
        return text.count("custom_vjp_call[")

    once = 2 * 7  # in a layer, for prompts and for completions
    assert products("none") == products("dots") == once
    assert products("layer") > once


def test_the_kernel_follows_the_devices():
    mesh = MeshConfig(fsdp=1).mesh()
    for dtype in ("float32", "bfloat16"):
        assert attention_on(mesh, "auto", dtype, 64).func is on_cpu
        assert attention_on(mesh, "xla", dtype, 64).func is on_cpu
        for name in ("splash", "cudnn"):
            with pytest.raises(UserError, match=f"model.attention={name} needs"):
                attention_on(mesh, name, dtype, 64)


@pytest.mark.parametrize(
    ("t", "p", "found"),
    [(31, 64, "xla"), (64, 64, "xla"), (65, 64, "splash"), (63, 128, "splash"), (90, 0, "xla")],
)
def test_on_a_tpu_short_sequences_are_xlas(t, p, found, monkeypatch):
    def named(name):
        return lambda *_, window: (name, window)

    monkeypatch.setattr(kernels, "causal", named("xla"))
    arrays = inputs(t, p, g=1, k=1)
    assert kernels._by_size(named("splash"), *arrays, window=3) == (found, 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dims", [D, D - 6])
def test_rotating_by_a_product_gives_the_same_numbers(dtype, dims):
    """To the last bit, and so do its gradients; also where a part of each head does not turn."""
    x, *_ = inputs(5, 0, dtype)
    positions = jnp.arange(5, dtype=jnp.int32)[None, None] + jnp.zeros((G, K, 1), jnp.int32)
    turned = rotations(positions, 100.0, None, dims)
    cos, sin = (a.astype(dtype) for a in turned[:2])
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def both(rotate):
        def total(x):
            out = rotate(x, cos, sin)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return out, gradient

    halves, product = both(rope._rotate_by_halves), both(rope._rotate_by_product)
    assert halves[0].dtype == product[0].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, halves, product)
