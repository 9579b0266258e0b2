"""The load of experts: transformers' load balancing loss, at any split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
import torch
from test_families import COMPLETIONS, LENGTHS, PROMPT_LENGTHS, PROMPTS, Case, torch_gradients
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from gvpo_jax.data.batch import Batch
from gvpo_jax.errors import UserError
from gvpo_jax.models.hf_tensors import named_tensors
from gvpo_jax.parallel.layout import place_batch, place_params
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.balance import Load, aux_loss, counted_tokens, load_metrics
from gvpo_jax.training.objectives import gvpo
from gvpo_jax.training.step import init_state, token_logps_and_load, train_step

VALID = np.array([[True, True], [True, False]])
COEF = 0.5


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Of two layers of experts."""
    sizes = {"num_hidden_layers": 2, "mlp_only_layers": []}
    return Case("qwen3_moe", tmp_path_factory.mktemp("experts"), **sizes)


def batch_of(groups=2):
    """The same prompts and completions again and again, with other rewards."""
    again, rng = groups // 2, np.random.default_rng(0)
    prompts, prompt_lengths, completions, lengths, valid = (
        np.concatenate([x] * again) for x in (PROMPTS, PROMPT_LENGTHS, COMPLETIONS, LENGTHS, VALID)
    )
    completions = (completions + np.arange(groups)[:, None, None] // 2) % 61
    rewards = rng.normal(size=valid.shape).astype(np.float32)
    nothing = np.zeros(completions.shape, np.float32)
    numbers = np.zeros(valid.shape, np.int32)
    arrays = (prompts, prompt_lengths, completions, lengths, rewards, valid, nothing, nothing)
    return Batch(*arrays, numbers, numbers)


def torch_loss(model):
    """Of what the layers are given: each prompt once, of completions all tokens but the last."""
    layers = model.config.num_hidden_layers - len(model.config.mlp_only_layers)
    logits = [[] for _ in range(layers)]
    for g in range(2):
        prompt = PROMPTS[g, : PROMPT_LENGTHS[g]].tolist()
        rows = [(prompt, 0)]
        for k in np.flatnonzero(VALID[g]):
            rows.append(([*prompt, *COMPLETIONS[g, k, : LENGTHS[g, k] - 1]], len(prompt)))
        for tokens, first in rows:
            out = model(input_ids=torch.tensor([tokens]), output_router_logits=True)
            for layer, of_layer in zip(logits, out.router_logits, strict=True):
                layer.append(of_layer[first:])
    config = model.config
    whole = tuple(torch.cat(layer) for layer in logits)
    return load_balancing_loss_func(whole, config.num_experts, config.num_experts_per_tok)


@pytest.mark.parametrize("packed_size", [None, 34], ids=["padded", "packed"])
def test_value_and_gradient_are_those_of_transformers(case, packed_size):
    batch = batch_of()

    def loss(params):
        arrays, counted = batch[:4], counted_tokens(batch)
        _, load = token_logps_and_load(case.fns, params, arrays, counted, packed_size=packed_size)
        return aux_loss(load)

    value, grads = jax.jit(jax.value_and_grad(loss))(case.ours.params)
    for parameter in case.torch.parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected = torch_loss(case.torch)
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    ours = named_tensors(case.ours.config, grads)
    for name, gradient in torch_gradients(case.torch):
        np.testing.assert_allclose(ours.read(name), gradient, atol=1e-5, err_msg=name)
    assert np.abs(ours.read("model.layers.1.mlp.gate.weight")).max() > 1e-3


def step(case, batch, *, coef, micro_batches=1, completion_parts=1, model=None):
    """The gradient of an update, read off a step of plain descent, and its metrics."""
    optimizer, params = optax.sgd(1.0), case.ours.params
    run = functools.partial(
        train_step,
        model=model or case.fns,
        optimizer=optimizer,
        objective=gvpo(beta=0.2),
        beta=0.2,
        micro_batches=micro_batches,
        completion_parts=completion_parts,
        router_aux_coef=coef,
    )
    state, metrics = jax.jit(run)(init_state(params, optimizer), batch)
    return jax.tree.map(np.subtract, params, state.params), metrics


def assert_close(found, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


def test_parts_of_groups_give_the_whole_batchs_gradient(case):
    whole, metrics = step(case, batch := batch_of(), coef=COEF)
    parts, split_metrics = step(case, batch, coef=COEF, completion_parts=2)
    without = parts_without(case)
    assert_close(parts, whole)
    for name in ("router/aux_loss", "router/max_share", "loss"):
        np.testing.assert_allclose(split_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    router = whole["layers"][1]["mlp"]["router"]["kernel"]
    assert np.abs(router - without["layers"][1]["mlp"]["router"]["kernel"]).max() > 1e-3


@functools.cache
def parts_without(case):
    """The gradient over parts of groups, without the coefficient."""
    return step(case, batch_of(), coef=0.0, completion_parts=2)[0]


def test_a_micro_batch_is_evened_out_by_itself(case):
    """By its tokens' share; what is logged is the whole batch's, and GVPO's gradient too."""
    batch = batch_of(4)
    split, metrics = step(case, batch, coef=COEF, micro_batches=2)
    plain, whole = step(case, batch, coef=0.0)
    for name in ("router/aux_loss", "router/max_share"):
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-5, err_msg=name)

    @jax.jit
    @jax.grad
    def evened(params, part):
        _, load = token_logps_and_load(case.fns, params, part[:4], counted_tokens(part))
        return COEF * aux_loss(load) * load.tokens

    tokens = sum(x.sum() for x in counted_tokens(batch))
    expected = plain
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        of_part = evened(case.ours.params, Batch(*(x[rows] for x in batch)))
        expected = jax.tree.map(lambda a, b: a + b / tokens, expected, of_part)
    assert_close(split, expected)


def test_without_the_coefficient_the_gradient_is_what_it_was(case):
    dense = dataclasses.replace(case.fns, routed=None)
    found, _ = step(case, batch_of(), coef=0.0, model=dense, completion_parts=2)
    jax.tree.map(np.testing.assert_array_equal, found, parts_without(case))


def test_the_metrics_of_a_load_by_hand():
    """Two layers, two experts, one for each of four tokens."""
    load = Load(jnp.array([[3.0, 1], [2, 2]]), jnp.array([[2.0, 2], [3, 1]]), jnp.array(4.0))
    metrics = load_metrics(load)
    assert float(metrics["router/aux_loss"]) == pytest.approx(2 * (5 * 5 + 3 * 3) / 64)
    assert float(metrics["router/max_share"]) == 0.75


def test_over_a_mesh_it_is_the_same(case):
    batch = batch_of(4)
    arrays = dict(zip(("prompts", "prompt_lengths", "completions", "lengths"), batch, strict=False))
    found = []
    for mesh in (MeshConfig(fsdp=1).mesh(jax.devices()[:1]), MeshConfig(fsdp=4).mesh()):
        model = small_run.config("unused").model.functions(case.ours.config, mesh, "model")
        on_mesh = place_batch(mesh, arrays, 2)
        placed = tuple(on_mesh[name] for name in arrays)

        def loss(params, model=model, placed=placed):
            _, load = token_logps_and_load(model, params, placed, counted_tokens(batch))
            return aux_loss(load)

        params = place_params(mesh, case.ours.params)
        found.append(jax.jit(jax.value_and_grad(loss))(params))
    assert_close(*found, atol=1e-5)


def test_a_coefficient_for_a_model_without_experts_is_refused(tmp_path):
    c = small_run.config(tmp_path / "run", loss__router_aux_coef=0.01)
    with pytest.raises(UserError, match=r"^loss.router_aux_coef=0.01 is for mixtures of experts"):
        Trainer(c)
