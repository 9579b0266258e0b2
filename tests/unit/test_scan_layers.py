"""Layers that are stacked and scanned give what they give one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding import last_bits

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.data.batch import Batch
from gvpo_jax.models import load_model
from gvpo_jax.models.config import LoraConfig, ModelConfig
from gvpo_jax.models.decoder import (
    DecoderConfig,
    DecoderOptions,
    decoder_fns,
    init_params,
    param_shapes,
)
from gvpo_jax.models.lora import Lora, adapter_shapes
from gvpo_jax.models.shape import Experts
from gvpo_jax.models.stacking import places_of
from gvpo_jax.parallel.layout import STACKED, path_name, shardings
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.rollout.routing import chosen_in_scoring
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.objectives import gvpo
from gvpo_jax.training.step import init_state, train_step

PLAIN = DecoderConfig("llama", 37, 16, 24, 3, 4, 2, 4)
LOCAL = dataclasses.replace(PLAIN, local_rope_theta=100.0, norms="both", norm="one_plus")
# One model for each thing that tells layers apart; each has layers before, in and after the scan.
MODELS = {
    "alike": PLAIN,
    "windows": dataclasses.replace(LOCAL, num_layers=7, windows=(*(3, None) * 3, 3), qk_norm=True),
    "no_positions": dataclasses.replace(PLAIN, num_layers=4, no_rope_layers=(1, 3)),
    "experts": dataclasses.replace(PLAIN, experts=Experts(5, 2, 12, True, (0,), shared_size=7)),
    "shared_keys": dataclasses.replace(
        LOCAL, num_layers=7, windows=(*(3, None) * 3, 3), shared_layers=2, shared_width=2,
        per_layer_width=5, full_head_dim=8, keys_as_values=True, value_norm=True, layer_scalar=True,
    ),
}  # fmt: skip
PLACES = {
    "alike": ((0, 1, 2),),
    "windows": ((0, 2, 4), (1, 3, 5), (6,)),
    "no_positions": ((0, 2), (1, 3)),
    "experts": ((0,), (1, 2)),
    "shared_keys": ((0, 2), (1, 3), (4,), (5,), (6,)),
}
FORM = Lora(2, 4.0, ("q", "down"))


def batch():
    """Two groups of three completions, of several lengths."""
    rng = np.random.default_rng(0)
    g, k, p, t = 2, 3, 6, 5
    return Batch(
        prompts=rng.integers(0, 37, (g, p)).astype(np.int32),
        prompt_lengths=np.array([6, 4], np.int32),
        completions=rng.integers(0, 37, (g, k, t)).astype(np.int32),
        lengths=rng.integers(1, t + 1, (g, k)).astype(np.int32),
        rewards=rng.normal(size=(g, k)).astype(np.float32),
        valid=np.ones((g, k), bool),
        ref_logps=rng.normal(-3, 1, (g, k, t)).astype(np.float32),
        old_logps=np.full((g, k, t), np.nan, np.float32),
        source=np.zeros((g, k), np.int32),
        version=np.zeros((g, k), np.int32),
    )


def update(config, *, scan, frozen=None, params=None, **options):
    """The gradient, read off a step of plain descent with rate 1, and the metrics."""
    lora = None if frozen is None else FORM
    remat = options.pop("remat", "none")
    fns = decoder_fns(config, DecoderOptions(scan_layers=scan, lora=lora, remat=remat))
    params = init_params(config, 0) if params is None else params
    optimizer = optax.sgd(1.0)
    step = functools.partial(
        train_step, model=fns, optimizer=optimizer, objective=gvpo(beta=0.2), beta=0.2, **options
    )
    state, metrics = jax.jit(step)(init_state(params, optimizer), batch(), frozen)
    return jax.tree.map(jnp.subtract, params, state.params), metrics, params


def assert_same_update(config, **options):
    plain, metrics, params = update(config, scan=False, **options)
    scanned, scanned_metrics, _ = update(config, scan=True, **options)
    atol = last_bits(params)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(scanned), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol, err_msg=path_name(path))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(plain)) > 100 * atol
    for name, value in metrics.items():
        np.testing.assert_allclose(scanned_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_scan_goes_over_whole_periods_of_layers_that_are_alike(name):
    assert places_of(MODELS[name]) == PLACES[name]


# Each model packed or padded, each way to save memory once.
CASES = {
    "alike": {"micro_batches": 2, "remat": "dots"},
    "windows": {"packed_size": 48, "remat": "layer"},
    "no_positions": {"completion_parts": 3},
    "experts": {"packed_size": 48, "router_aux_coef": 0.5},
    "shared_keys": {"packed_size": 48},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_update_is_the_same(name):
    assert_same_update(MODELS[name], **CASES[name])


@pytest.mark.parametrize("name", ["experts", "shared_keys"])
def test_an_update_with_padding_is_the_same(name):
    assert_same_update(MODELS[name])


def test_an_adapters_update_is_the_same():
    shapes = adapter_shapes(param_shapes(PLAIN), FORM)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    assert_same_update(PLAIN, frozen=init_params(PLAIN, 0), params=params)


def test_experts_in_scoring_are_those_of_each_layer_and_compiled_once():
    config, params = MODELS["experts"], init_params(MODELS["experts"], 0)
    arrays = params, *batch()[:3]

    def chosen(*, scan):
        fns = decoder_fns(config, DecoderOptions(scan_layers=scan))
        return functools.partial(chosen_in_scoring, fns)

    scanned = jax.jit(chosen(scan=True))(*arrays)
    np.testing.assert_array_equal(scanned, jax.jit(chosen(scan=False))(*arrays))
    routers = {s: str(jax.make_jaxpr(chosen(scan=s))(*arrays)).count("top_k") for s in (0, 1)}
    assert routers == {0: 4, 1: 2}  # two layers with experts, of prompts and of completions


@pytest.mark.parametrize("parts", ["micro_batches", "completion_parts"])
def test_gradients_of_parts_add_up_in_float32_where_layers_are_stacked_in_bfloat16(parts):
    params, optimizer = init_params(PLAIN, 0), optax.sgd(1.0)
    step = functools.partial(
        train_step,
        model=decoder_fns(PLAIN, DecoderOptions(dtype=jnp.bfloat16, scan_layers=True)),
        optimizer=optimizer,
        objective=gvpo(beta=0.2),
        beta=0.2,
        **{parts: 2},
    )
    program = jax.make_jaxpr(step)(init_state(params, optimizer), batch()).jaxpr
    kernel = (3, *params["layers"][0]["mlp"]["up"]["kernel"].shape)  # of three layers
    sums = [
        variable.aval.dtype
        for equation in program.eqns
        if equation.primitive.name in ("scan", "while")
        for variable in equation.outvars
        if variable.aval.shape == kernel
    ]
    assert set(sums) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("scan", [False, True])
def test_what_the_optimizer_keeps_has_the_dtype_of_the_parameters(scan):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(PLAIN, 0))
    fns, optimizer = decoder_fns(PLAIN, DecoderOptions(scan_layers=scan)), optax.adam(1e-3)
    step = functools.partial(
        train_step, model=fns, optimizer=optimizer, objective=gvpo(beta=0.2), beta=0.2
    )
    before = init_state(params, optimizer)
    after, _ = jax.eval_shape(step, before, batch())
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


@pytest.mark.parametrize("part", ["whole", "adapter"])
def test_stacked_and_unstacked_again_nothing_has_changed(part):
    config = MODELS["windows"]
    params = init_params(config, 0)
    if part == "adapter":
        shapes = adapter_shapes(params, FORM)
        params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    stacking = decoder_fns(config, DecoderOptions(scan_layers=True)).stacking
    assert stacking is not None
    stacked = stacking.stack(params)
    assert set(stacked[STACKED]) == {0, 1, 2}
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, stacking.unstack(stacked), params)


def test_in_bfloat16_norms_in_float32_stay_so_in_the_stack():
    options = DecoderOptions(dtype=jnp.bfloat16, scan_layers=True)
    stacking = decoder_fns(LOCAL, options).stacking
    assert stacking is not None
    stacked = jax.eval_shape(stacking.stack, param_shapes(LOCAL))[STACKED][0]
    assert stacked["attn"]["q"]["kernel"].dtype == jnp.bfloat16
    assert stacked["input_norm"]["scale"].dtype == jnp.float32


# Of sizes that divide over eight devices.
EIGHTHS = {
    "alike": PLAIN,
    "experts": dataclasses.replace(PLAIN, experts=Experts(8, 2, 16, True, (0,), shared_size=8)),
    "shared_keys": dataclasses.replace(MODELS["shared_keys"], per_layer_width=8),
}


@pytest.mark.parametrize(
    ("name", "options", "path", "spec"),
    [
        ("alike", {}, "attn/q/kernel", ("fsdp", "tensor")),
        ("alike", {"lora": LoraConfig(rank=2)}, "mlp/down/lora_a", ("tensor", None)),
        (
            "alike",
            {"lora": LoraConfig(rank=2), "quantization": "int8"},
            "attn/o/kernel",
            ("tensor", "fsdp"),
        ),
        ("experts", {}, "mlp/experts/up/kernel", None),
        ("shared_keys", {}, "mlp/up/kernel", ("fsdp", "tensor")),
    ],
)
def test_stacked_layers_are_cut_as_each_of_them_is(name, options, path, spec):
    """Kernels, adapters, quantised kernels and experts: all but the first axis, of layers."""
    mesh = MeshConfig(data=1, fsdp=2, tensor=4).mesh(jax.devices())
    shape = EIGHTHS[name]
    stacking = decoder_fns(shape, DecoderOptions(scan_layers=True)).stacking
    assert stacking is not None
    checked = []
    for params in ModelConfig(**options).param_shapes(shape):
        if "layers" not in params:
            continue
        stacked = jax.eval_shape(stacking.stack, {"layers": params["layers"]})
        for place, layers in enumerate(stacking.places):
            cut = shardings(mesh, stacked)[STACKED][place]
            each = shardings(mesh, {"layers": params["layers"]})["layers"][layers[0]]
            front = (None,) if len(layers) > 1 else ()
            for (name, a), b in zip(
                jax.tree.leaves_with_path(cut), jax.tree.leaves(each), strict=True
            ):
                assert tuple(a.spec) == (*front, *b.spec), path_name(name)
                checked += [tuple(b.spec)] if path_name(name).startswith(path) else []
    assert checked
    assert spec is None or spec in checked
    assert any(any(axis is not None for axis in found) for found in checked)


def test_a_trainer_with_quantised_weights_learns_the_same_on_a_mesh():
    def losses(scan):
        config = override(
            Config(),
            model__lora__rank=2,
            model__quantization="nf4",
            optimizer__learning_rate=1e-2,
            model__scan_layers=scan,
            mesh__data=2,
            mesh__fsdp=2,
            mesh__tensor=2,
            rollout__num_generations=4,
            rollout__max_completion_length=6,
            data__max_prompt_length=16,
        )
        trainer = Trainer(config, load_model("debug"))
        prompts, completions = ["AB", "C"], [["ab", "c", "def", "gh"], ["x", "yz", "uvw", "q"]]
        rewards = [[0.0, 1.0, 0.5, 0.2], [1.0, 0.0, 0.0, 0.3]]
        return [trainer.train_step(prompts, completions, rewards)["loss"] for _ in range(3)]

    plain = losses(False)
    assert abs(plain[2] - plain[0]) > 1e-2
    np.testing.assert_allclose(losses(True), plain, rtol=2e-5, atol=1e-5)
