"""QLoRA: a base in int8 or nf4, against a NumPy loop, qwix, and LoRA on the widened base."""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.experimental import topologies
from small_run import config, one_layer
from test_lora import LORA, ROWS, SCALE, logps, moved
from test_mesh import five_updates, policy
from test_own_model import debug_as_own

from gvpo_jax.config import check_extras
from gvpo_jax.config_file import load_config, override
from gvpo_jax.errors import UserError
from gvpo_jax.memory import memory_needed
from gvpo_jax.models import load_model
from gvpo_jax.models.blocks import MLP
from gvpo_jax.models.debug import debug_config
from gvpo_jax.models.decoder import DecoderConfig, DecoderOptions
from gvpo_jax.models.lora import Lora, adapt, join, merge
from gvpo_jax.models.quantized import (
    is_kernel,
    is_quantized,
    promote,
    quantize,
    tile_of,
    widen,
    with_quantized,
)
from gvpo_jax.models.shape import Experts
from gvpo_jax.parallel.layout import path_name
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.tpu_compile.lowering import device_bytes, run_programs
from gvpo_jax.tpu_compile.report import prepare
from gvpo_jax.trainer import Trainer

NF4 = {"model__quantization": "nf4", **LORA}
INT8 = {"model__quantization": "int8", **LORA}
# Appendix E of https://arxiv.org/abs/2305.14314, to four digits
LEVELS = np.array([
    -1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379,
    0.4407, 0.5626, 0.7230, 1,
])  # fmt: skip


def trainer(run_dir, **settings):
    return Trainer(config(run_dir, **settings), load_model("debug"))


def widened_model(kind):
    """A model with the weights that its quantised kernels stand for."""
    model = one_layer()

    def widened(path, x):
        name = path_name(path)
        return np.asarray(widen(quantize(x, kind), "float32")) if is_kernel(name, x) else x

    return dataclasses.replace(model, params=jax.tree.map_with_path(widened, model.params))


def kernel(rows=128, columns=6, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


# ---- the numbers


def test_nf4_is_the_nearest_level_of_each_tile_by_a_loop():
    w = kernel()
    q = quantize(w, "nf4")
    expected = np.zeros_like(w)
    for column in range(w.shape[1]):
        for start in (0, 64):
            tile = w[start : start + 64, column]
            scale = max(abs(tile))
            for row, x in enumerate(tile):
                nearest = min(LEVELS, key=lambda level, x=x, scale=scale: abs(level - x / scale))
                expected[start + row, column] = nearest * scale
    assert (q.qvalue.dtype, q.scale.shape) == (jnp.uint4, (2, 6))
    np.testing.assert_allclose(widen(q, "float32"), expected, atol=3e-4)


def test_int8_has_a_scale_for_each_column():
    w = kernel()
    scale = np.abs(w).max(axis=0) / 127.5
    largest = np.abs(w) == np.abs(w).max(axis=0)  # at 127.5, between two numbers
    q = quantize(w, "int8")
    assert (q.qvalue.dtype, q.scale.shape) == (jnp.int8, (1, 6))
    expected = np.round(w / scale) * scale
    wide = np.asarray(widen(q, "float32"))
    np.testing.assert_allclose(wide[~largest], expected[~largest], rtol=1e-6)
    assert (np.abs(wide - w) <= 0.501 * scale).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("rows", [128, 96, 16])
def test_widened_is_what_qwix_makes_of_it(kind, rows):
    q = quantize(kernel(rows), kind)
    exact = qwix.dequantize(q)
    np.testing.assert_array_equal(widen(q, "float32"), exact)
    np.testing.assert_array_equal(widen(q, "bfloat16"), exact.astype(jnp.bfloat16))


def test_tiles_divide_any_width():
    sizes = {576: 64, 96: 48, 100: 50, 33: 33, 67: 67, 16: 16}
    sizes[130] = 130  # its parts are 65 and 26: neither is from 32 to 64
    assert {width: tile_of(width) for width in sizes} == sizes


# ---- the layer


def test_gradients_of_an_adapter_are_those_beside_the_widened_base(x64):
    """In float64, layer by layer: what is widened in the backward pass is what was multiplied."""
    c, lora = debug_config(), Lora(3, 7.0, ("gate", "down"))
    dtype, product = jnp.float64, with_quantized(jax.lax.dot_general)
    linear = functools.partial(
        nnx.Linear, dtype=dtype, dot_general=product, promote_dtype=promote, rngs=nnx.Rngs(0)
    )
    mlp = MLP(c, c.intermediate_size, linear, DecoderOptions(dtype=dtype))
    base = nnx.to_pure_dict(nnx.split(mlp)[1])
    adapt(mlp, lora, nnx.Rngs(0))
    graph, both = nnx.split(mlp)
    rng = np.random.default_rng(0)
    adapter = {
        name: {x: 0.1 * rng.standard_normal(layer[x].shape) for x in ("lora_a", "lora_b")}
        for name, layer in nnx.to_pure_dict(both).items()
        if name != "up"
    }
    x = rng.standard_normal((1, 2, 3, c.hidden_size))

    def loss(adapter, x, frozen):
        return jnp.sum(jnp.sin(nnx.merge(graph, join(frozen, adapter))(x)))

    for kind in ("int8", "nf4"):
        frozen = {name: {"kernel": quantize(w["kernel"], kind)} for name, w in base.items()}
        wide = {name: {"kernel": widen(w["kernel"], dtype)} for name, w in frozen.items()}
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        ours, theirs = (gradient(adapter, x, w) for w in (frozen, wide))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)
        merged = merge(frozen, adapter, 7 / 3, dtype)
        expected = merge(wide, adapter, 7 / 3, dtype)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), merged, expected)
        assert np.abs(merged["gate"]["kernel"] - wide["gate"]["kernel"]).max() > 0.01


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_backward_pass_is_left_the_quantised_kernel_alone(kind):
    x, q = jnp.ones((2, 128)), quantize(kernel(128, 32), kind)
    last = (((1,), (0,)), ((), ()))
    _, backward = jax.vjp(lambda x: with_quantized(jax.lax.dot_general)(x, q, last), x)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= q.qvalue.size]
    assert {leaf.dtype for leaf in kept} == {q.qvalue.dtype}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_tpu_keeps_no_wide_kernel(kind):
    """Forward and backward: its compiler makes widening a part of the product."""
    prepare()
    one = topologies.get_topology_desc("v5e:1x1", platform="tpu", chips_per_host_bounds=(1, 1, 1))
    layout = jax.sharding.SingleDeviceSharding(one.devices[0])

    def shape(*size, dtype):
        return jax.ShapeDtypeStruct(size, dtype, sharding=layout)

    q = jax.eval_shape(functools.partial(quantize, kind=kind), shape(512, 1024, dtype="float32"))
    q = jax.tree.map(lambda x: x.update(sharding=layout), q)
    product = with_quantized(jax.lax.dot_general)

    def loss(x, q):
        return jnp.sum(product(x, q, (((1,), (0,)), ((), ()))).astype(jnp.float32) ** 2)

    x = shape(256, 512, dtype=jnp.bfloat16)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, q).compile()
    memory = compiled.memory_analysis()
    bits = {"int8": 8, "nf4": 4}[kind]
    scales = 4 * q.scale.size
    kept = memory.argument_size_in_bytes - 2 * 256 * 512 - 512 * 1024 * bits // 8 - scales
    assert 0 <= kept < 40_000  # padding of the int8 kernel's one row of scales
    assert memory.temp_size_in_bytes < 2 * 512 * 1024  # of the kernel in bfloat16


# ---- all that updates do


@pytest.fixture(scope="module", params=["int8", "nf4"])
def beside_widened(request, tmp_path_factory):
    """Five updates, and those of LoRA on the weights that the quantised ones stand for."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    ours = Trainer(config(folder, model__quantization=kind, **LORA), one_layer())
    theirs = Trainer(config(folder, **LORA), widened_model(kind))
    start = [logps(it.policy, it.policy.params) for it in (ours, theirs)]
    reference = logps(ours.policy, ours.policy.reference)
    return kind, ours, five_updates(ours), five_updates(theirs), start, reference


def test_updates_are_those_beside_the_widened_base(beside_widened):
    _, _, (losses, samples), (expected, their_samples), start, reference = beside_widened
    np.testing.assert_array_equal(*start)
    np.testing.assert_array_equal(start[0], reference)  # a new adapter changes no bit
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for a, b in zip(samples, their_samples, strict=True):
        np.testing.assert_array_equal(a.completions, b.completions)
        np.testing.assert_allclose(a.old_logps, b.old_logps, atol=2e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_nothing_but_the_linear_kernels_of_layers_is_quantised(tmp_path, kind):
    """And all is counted to the byte."""
    it = trainer(tmp_path, model__quantization=kind, **LORA)
    frozen = {"/".join(map(str, path)): x for path, x in flatten_dict(it.policy.frozen).items()}
    names = {name for name, x in frozen.items() if is_quantized(x)}
    layers = range(it.model.config.num_layers)
    parts = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    assert names == {f"layers/{i}/{part}/kernel" for i in layers for part in parts}
    assert not is_kernel("layers/0/mlp/router/kernel", np.zeros((4, 4)))
    needed = memory_needed(it.config, it.model.config, it.config.mesh.mesh())
    kernels = sum(x.qvalue.size for x in frozen.values() if is_quantized(x))
    scales = sum(x.scale.nbytes for x in frozen.values() if is_quantized(x))
    others = sum(x.nbytes for x in frozen.values() if not is_quantized(x))
    adapter = sum(x.nbytes for x in jax.tree.leaves(it.policy.params))
    base = kernels * {"int8": 8, "nf4": 4}[kind] // 8 + scales + others
    assert needed["parameters"] == base + adapter
    assert needed["merged weights"] == 4 * kernels
    assert device_bytes(it.policy.frozen) == base


@pytest.mark.parametrize("beside_widened", ["nf4"], indirect=True)
def test_every_kind_of_update_gives_the_same_losses(beside_widened, tmp_path):
    kind, _, (losses, _), *_ = beside_widened
    of_run = config(
        tmp_path, model__quantization=kind, **LORA, train__micro_batches=2, model__remat="dots",
        train__completion_parts=2, train__packing=False, rollout__adapter="apart",
    )  # fmt: skip
    np.testing.assert_allclose(five_updates(Trainer(of_run, one_layer()))[0], losses, rtol=1e-3)


@pytest.fixture(scope="module")
def alone():
    one = policy(1, 1, 1, **NF4)
    return one, *five_updates(one)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [((1, 2, 4), {}), ((2, 2, 2), {"rollout__tensor": 1, "rollout__adapter": "apart"})],
)
def test_any_mesh_gives_the_single_devices_samples_and_trajectory(alone, sizes, settings):
    one, losses, samples = alone
    many = policy(*sizes, **NF4, **settings)
    assert many.policy.start_fingerprint == one.policy.start_fingerprint
    many_losses, many_samples = five_updates(many)
    np.testing.assert_allclose(many_losses, losses, atol=1e-6)
    for a, b in zip(many_samples, samples, strict=True):
        np.testing.assert_array_equal(a.completions, b.completions)
    down = many.policy.frozen["layers"][0]["mlp"]["down"]["kernel"]
    parts = [x.addressable_shards[0].data.shape for x in (down.qvalue, down.scale)]
    _, fsdp, tensor = sizes
    # Two scales a column: they don't divide over four devices, and lie on each.
    assert parts == [(128 // tensor, 64 // fsdp), (2 if tensor == 4 else 1, 64 // fsdp)]


@pytest.mark.parametrize("adapter", ["merged", "apart"])
def test_programs_are_lowered_with_what_lies_beside_them(tmp_path, adapter):
    it = trainer(tmp_path, **NF4, rollout__adapter=adapter)
    programs = run_programs(it.config, it.model.config, it.config.mesh.mesh())
    decode = {program.name: program for program in programs}["rollout: decode"]
    frozen, state = it.policy.frozen, device_bytes(it.policy.state)
    weights = it.engine.model.prepare(it.policy.params, frozen)
    held = {id(x) for x in jax.tree.leaves((it.policy.params, frozen))}
    shared = device_bytes([x for x in jax.tree.leaves(weights) if id(x) in held])
    reference = device_bytes(it.policy.reference)
    assert decode.beside == state + reference + device_bytes(frozen) - shared
    for program in programs:
        program.lower()


# ---- runs and their checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of two updates."""
    folder = tmp_path_factory.mktemp("qlora") / "run"
    it = trainer(folder, **NF4, train__steps=2, reference__name="ema")
    it.train(ROWS, letter_share)
    return it, folder


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(run, tmp_path):
    whole, folder = run
    assert next(row for row in read_metrics(folder) if "kl" in row)["kl"] == 0
    for stop in (1, None):
        settings = {"train__steps": 2, "reference__name": "ema", "train__stop_at": stop}
        it = trainer(tmp_path / "run", **NF4, **settings)
        it.train(ROWS, letter_share)
    jax.tree.map(np.testing.assert_array_equal, it.policy.params, whole.policy.params)
    jax.tree.map(np.testing.assert_array_equal, it.policy.reference, whole.policy.reference)


@pytest.mark.parametrize(("other", "told"), [(INT8, "nf4"), (LORA, "nf4")])
def test_another_quantizations_checkpoint_is_refused(run, tmp_path, other, told):
    _, folder = run
    settings = {"train__steps": 2, "reference__name": "ema"}
    with pytest.raises(UserError, match=f"of a run with model.quantization={told}: give that"):
        trainer(tmp_path, **other, **settings).restore(folder)
    with pytest.raises(UserError, match=r"other settings.*model.quantization"):
        trainer(folder, **other, **settings).train(ROWS, letter_share)


def test_exports_are_merged_into_the_weights_before_quantization(tmp_path):
    it = trainer(tmp_path / "run", **NF4)
    it.policy._start = moved(it.policy.params)
    with pytest.raises(UserError, match="an adapter is not merged into quantised weights"):
        it.policy.whole(it.policy.params)
    original = load_model("debug").params
    it.save_pretrained(tmp_path / "merged")
    found = load_model(str(tmp_path / "merged")).params
    adapter = jax.tree.map(np.asarray, it.policy.params)
    for path, w in flatten_dict(original).items():
        here = functools.reduce(lambda tree, name: tree[name], path, found)
        layer = functools.reduce(lambda tree, name: tree.get(name, {}), path[:-1], adapter)
        added = SCALE * layer["lora_a"] @ layer["lora_b"] if layer else 0
        np.testing.assert_allclose(here, w + added, atol=1e-6, err_msg=str(path))
    it.save_adapter(tmp_path / "adapter")
    begun = trainer(tmp_path / "on", **NF4, model__adapter=str(tmp_path / "adapter")).policy
    np.testing.assert_array_equal(logps(begun, begun.params), logps(it.policy, it.policy.params))


def test_an_export_of_a_model_that_has_changed_is_refused(tmp_path):
    model = load_model("debug")
    model.params["layers"][1]["mlp"]["up"]["kernel"][0, 0] += 1
    it = Trainer(config(tmp_path / "run", **NF4), model)
    with pytest.raises(UserError, match=r"debug is not the model that was quantised: its layers/1"):
        it.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.quantization=nf4"], "is for weights that are not trained: give model.lora.rank"),
        (["model.quantization=fp4", "model.lora.rank=4"], "model.quantization.*int8"),
        (
            [
                "model.quantization=nf4",
                "model.lora.rank=4",
                "servers.kind=vllm",
                "servers.urls=[a]",
            ],
            "model.quantization=nf4 is for sampling in this process",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_a_line(tmp_path, settings, message):
    (tmp_path / "c.yaml").write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    with pytest.raises(UserError, match=message) as told:
        load_config(tmp_path / "c.yaml", settings)
    assert "\n" not in str(told.value)


def test_experts_are_refused_before_weights_are_read():
    experts = Experts(count=4, per_token=2, intermediate_size=8, normalised=True)
    sizes = (64, 16, 32, 2, 4, 2, 8)
    shape = DecoderConfig("qwen3_moe", *sizes, qk_norm=True, experts=experts)
    model = override(config("."), **NF4, model__lora__targets=["q"]).model
    with pytest.raises(UserError, match="the experts of a mixture can't be quantised"):
        model.param_shapes(shape)


def test_a_model_of_ones_own_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model.lora, model.quantization: that is for models"):
        Trainer(config(tmp_path, **NF4), debug_as_own()[1])


def test_without_qwix_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    quantize.clear_cache()
    c = config(tmp_path, **NF4)
    message = re.escape('model.quantization=nf4 needs qwix: pip install "gvpo-jax[qlora]"')
    with pytest.raises(UserError, match=message):
        Trainer(c)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'\(qwix\): pip install "gvpo-jax\[qlora\]"'):
        check_extras(c)
