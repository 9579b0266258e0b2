"""LoRA: against merged weights in PyTorch and float64, PEFT's file format, and full runs."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from flax.traverse_util import flatten_dict
from http_stub import StubServer, network_of
from safetensors.numpy import load_file, save_file
from small_run import config
from test_families import FAMILIES, Case
from test_mesh import five_updates, policy

from gvpo_jax.cli import main
from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, override, to_yaml
from gvpo_jax.errors import UserError
from gvpo_jax.memory import memory_needed
from gvpo_jax.models import load_model
from gvpo_jax.models.adapters import as_peft, base_warning, export_adapter, read_adapter
from gvpo_jax.models.blocks import MLP
from gvpo_jax.models.config import LoraConfig, ModelConfig
from gvpo_jax.models.debug import debug_config
from gvpo_jax.models.decoder import (
    DecoderConfig,
    DecoderOptions,
    decoder_fns,
    full_logits,
    init_params,
    param_shapes,
)
from gvpo_jax.models.export import export_model
from gvpo_jax.models.lora import Lora, adapt, adapter_shapes, init_adapter, join, merge
from gvpo_jax.models.lora_targets import TARGETS
from gvpo_jax.models.shape import Experts
from gvpo_jax.parallel.layout import LAYOUT, path_name
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rollout import SamplingParams
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.tpu_compile.lowering import run_programs
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.checkpoint import Checkpoints

LORA = {"model__lora__rank": 4, "model__lora__alpha": 8}
SCALE = 8 / 4
ROWS = [{"prompt": f"Spell {word}: "} for word in ("ash", "birch", "cedar", "fir", "oak")]
PROMPTS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
COMPLETIONS = np.array([[[20, 21, 22], [23, 24, 25]], [[30, 31, 32], [33, 34, 35]]])
BATCH = {
    "prompts": jnp.asarray(PROMPTS),
    "prompt_lengths": jnp.array([4, 4]),
    "completions": jnp.asarray(COMPLETIONS),
}


def trainer(run_dir, **settings):
    return Trainer(config(run_dir, **LORA | settings), load_model("debug"))


def moved(adapter, seed=0):
    """An adapter that changes the model: its B are no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapter)


def logps(policy, params):
    return np.asarray(policy._programs.token_logps(params, BATCH, frozen=policy.frozen))


def paths(tree):
    return {path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two updates."""
    run = tmp_path_factory.mktemp("lora") / "run"
    done = trainer(run, train__steps=2)
    done.train(ROWS, letter_share)
    return done, run


# ---- the layer, and what it does to gradients


def test_gradients_are_those_of_merged_weights_by_the_chain_rule(x64):
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW', in float64."""
    c, options, lora = (
        debug_config(),
        DecoderOptions(dtype=jnp.float64),
        Lora(3, 7.0, ("up", "down")),
    )
    linear = functools.partial(nnx.Linear, dtype=jnp.float64, rngs=nnx.Rngs(0))
    mlp = MLP(c, c.intermediate_size, linear, options)
    plain, base = nnx.split(mlp)
    base = jax.tree.map(lambda x: x.astype(jnp.float64), nnx.to_pure_dict(base))
    adapt(mlp, lora, nnx.Rngs(0))
    graph, both = nnx.split(mlp)
    rng = np.random.default_rng(0)
    adapter = {
        name: {x: 0.1 * rng.standard_normal(layer[x].shape) for x in ("lora_a", "lora_b")}
        for name, layer in nnx.to_pure_dict(both).items()
        if name != "gate"
    }
    x = rng.standard_normal((1, 2, 3, c.hidden_size))

    def loss(graph, params):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

    merged = join(base, merge(base, adapter, 7 / 3, np.float64))
    whole = jax.jit(jax.grad(lambda params: loss(plain, params)))(merged)
    ours = jax.jit(jax.grad(lambda params: loss(graph, join(base, params))))(adapter)
    np.testing.assert_allclose(loss(graph, join(base, adapter)), loss(plain, merged), rtol=1e-11)
    for name in ("up", "down"):
        a, b = adapter[name]["lora_a"], adapter[name]["lora_b"]
        d_kernel = whole[name]["kernel"]
        np.testing.assert_allclose(ours[name]["lora_a"], 7 / 3 * d_kernel @ b.T, atol=1e-11)
        np.testing.assert_allclose(ours[name]["lora_b"], 7 / 3 * a.T @ d_kernel, atol=1e-11)


def test_log_probs_and_gradients_are_pytorchs_of_the_exported_merged_model(trained, tmp_path):
    it = trained[0].policy
    params = moved(it.params)
    whole = it.whole(params)
    export_model(tmp_path / "merged", trained[0].model, whole)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double()
    prompts = np.repeat(PROMPTS, 2, axis=0)
    tokens = torch.tensor(np.concatenate([prompts, COMPLETIONS.reshape(4, 3)], axis=1))
    scores = torch.log_softmax(model(tokens).logits[:, 3:-1], dim=-1)
    theirs = torch.gather(scores, 2, tokens[:, 4:, None])[..., 0]
    theirs.sum().backward()
    np.testing.assert_allclose(logps(it, params).reshape(4, 3), theirs.detach().numpy(), atol=2e-5)

    def total(p):
        return it._programs.token_logps(p, BATCH, frozen=it.frozen).sum()

    ours = jax.jit(jax.grad(total))(params)
    for layer, of_layer in enumerate(model.model.layers):
        for part, module, name in (
            ("attn", of_layer.self_attn, "k"),
            ("mlp", of_layer.mlp, "down"),
        ):
            d_kernel = getattr(module, TARGETS[name]).weight.grad.numpy().T
            here, found = params["layers"][layer][part][name], ours["layers"][layer][part][name]
            for which, expected in (
                ("lora_a", SCALE * d_kernel @ here["lora_b"].T),
                ("lora_b", SCALE * np.asarray(here["lora_a"]).T @ d_kernel),
            ):
                scale = np.abs(expected).max()
                np.testing.assert_allclose(found[which] / scale, expected / scale, atol=1e-4)


# ---- the reference is the base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_no_bit(tmp_path, dtype):
    """The policy is its reference, and the model without an adapter."""
    it = trainer(tmp_path, model__dtype=dtype).policy
    plain = Trainer(config(tmp_path, model__dtype=dtype), load_model("debug")).policy
    np.testing.assert_array_equal(logps(it, it.params), logps(it, it.reference))
    np.testing.assert_array_equal(logps(it, it.params), logps(plain, plain.params))
    assert it.reference_fingerprint == plain.reference_fingerprint  # of cached `ref_logps`
    assert any(x.any() for x in jax.tree.leaves(it.params))


def test_the_first_log_ratio_of_a_run_is_zero(trained):
    _, run = trained
    first, second = (row for row in read_metrics(run) if "log_ratio" in row)
    assert first["log_ratio"] == first["kl"] == 0
    assert second["log_ratio"] != 0
    assert first["grad_norm"] > 0


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_reference_costs_no_second_copy_of_the_model(tmp_path, dtype, width):
    """The base once, in the dtype of the computation; beside it only what has an adapter's size."""
    model, kept = load_model("debug"), sum(x.nbytes for x in jax.live_arrays())
    it = Trainer(config(tmp_path, **LORA, model__dtype=dtype), model)
    held = sum(x.nbytes for x in jax.live_arrays()) - kept
    base = sum(x.size for x in jax.tree.leaves(model.params)) * width
    adapter = sum(x.nbytes for x in jax.tree.leaves(it.policy.params))
    assert adapter == 4 * 2 * 4 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 3 * (64 + 128)))
    assert adapter < base / 4
    assert held - base == adapter + adapter * width // 4  # the policy's, the reference's
    needed = memory_needed(it.config, it.model.config, it.config.mesh.mesh())
    assert (needed["parameters"], needed["gradients"]) == (base + adapter, adapter)
    assert needed["reference"] == adapter * width // 4
    assert needed["optimizer state"] - 2 * adapter < 64
    kernels = sum(x.size for p, x in flatten_dict(model.params).items() if p[-1] == "kernel")
    apart = override(it.config, rollout__adapter="apart")
    assert "merged weights" not in memory_needed(apart, it.model.config, it.config.mesh.mesh())
    assert needed["merged weights"] == width * (kernels - model.params["head"]["kernel"].size)


# ---- all that updates do


def test_every_kind_of_update_moves_adapters_alone_and_alike(tmp_path):
    """Parts of groups and of completions, padding, and what the backward pass computes again."""
    plain = trainer(tmp_path)
    frozen = jax.tree.map(np.array, plain.policy.frozen)
    losses, _ = five_updates(plain)
    jax.tree.map(np.testing.assert_array_equal, frozen, plain.policy.frozen)
    start = trainer(tmp_path).policy.params
    for path, leaf in flatten_dict(plain.policy.params).items():
        before = start
        for part in path:
            before = before[part]
        assert (np.asarray(leaf) != np.asarray(before)).any(), path
    parts = {"train__micro_batches": 2, "train__completion_parts": 2, "train__packing": False}
    for settings in (parts | {"model__remat": "layer"}, {"model__remat": "dots"}):
        other = trainer(tmp_path, **settings)
        np.testing.assert_allclose(five_updates(other)[0], losses, rtol=1e-4)


@pytest.fixture(scope="module")
def alone():
    one = policy(1, 1, 1, **LORA)
    return one, *five_updates(one)


@pytest.mark.parametrize(
    ("sizes", "settings"), [((2, 2, 2), {}), ((1, 8, 1), {"rollout__tensor": 2})]
)
def test_any_mesh_gives_the_single_devices_samples_and_trajectory(alone, sizes, settings):
    one, losses, samples = alone
    many = policy(*sizes, **LORA, **settings)
    many_losses, many_samples = five_updates(many)
    np.testing.assert_allclose(many_losses, losses, atol=1e-6)
    for a, b in zip(many_samples, samples, strict=True):
        np.testing.assert_array_equal(a.completions, b.completions)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        many.policy.params,
        one.policy.params,
    )


def test_adapters_are_cut_as_their_kernels_are(alone):
    many = policy(2, 2, 2, **LORA).policy.params["layers"][0]
    shapes = {
        name: (part[name]["lora_a"], part[name]["lora_b"])
        for part, name in ((many["attn"], "q"), (many["mlp"], "down"))
    }
    for a, b in shapes.values():
        assert 2 * a.addressable_shards[0].data.shape[0] == a.shape[0]
        assert 2 * b.addressable_shards[0].data.shape[1] == b.shape[1]
    assert shapes["q"][0].sharding.spec[0] == shapes["down"][1].sharding.spec[1] == "fsdp"
    assert shapes["q"][1].sharding.spec[1] == shapes["down"][0].sharding.spec[0] == "tensor"
    for path in paths(alone[0].policy.params):
        assert any(re.search(pattern, path) for pattern, _ in LAYOUT), path


@pytest.mark.parametrize(("adapter", "tensor"), [("merged", None), ("merged", 2), ("apart", 2)])
def test_samples_have_the_log_probs_that_training_computes(tmp_path, adapter, tensor):
    """Of merged weights and of an adapter beside them, also where they are cut otherwise."""
    cut = {"rollout__tensor": tensor, "rollout__adapter": adapter}
    it = trainer(tmp_path, mesh__fsdp=2, mesh__data=1, **cut)
    params = moved(it.policy.params)
    drawn = it.engine.generate(
        params, PROMPTS.tolist(), range(2), num_generations=4, max_completion_length=6,
        sampling=SamplingParams(), seed=0,
    )  # fmt: skip
    scored = it.policy.logps_of_all(params, PROMPTS, np.array([4, 4]), drawn.completions)
    told = np.arange(6) < drawn.lengths[..., None]
    np.testing.assert_allclose(drawn.old_logps[told], scored[told], atol=2e-5)
    base = it.policy.logps_of_all(it.policy.params, PROMPTS, np.array([4, 4]), drawn.completions)
    assert np.abs(base - scored)[told].max() > 0.1


# ---- checkpoints


def test_checkpoints_hold_the_adapter_alone(trained):
    done, run = trained
    with Checkpoints(run / "checkpoints") as checkpoints:
        about = checkpoints.about()
    assert about["lora"] == {"rank": 4, "alpha": 8, "targets": list(TARGETS)}
    assert about["start_fingerprint"] == done.policy.start_fingerprint
    saved = {name.partition("/")[2] for name in about["checksums"] if name.startswith("params/")}
    assert saved == paths(done.policy.params)
    assert all(name.endswith(("lora_a", "lora_b")) for name in saved)
    base = sum(x.nbytes for x in jax.tree.leaves(done.policy.frozen))
    (newest,) = (run / "checkpoints").glob("2")
    assert sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) < base


def other_base():
    model = load_model("debug")
    model.params["layers"][1]["mlp"]["up"]["kernel"][0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__lora__rank": 8}, r"of a run with model.lora.rank=4, model.lora.alpha=8"),
        ({"model__lora__alpha": 16}, r"of a run with model.lora.rank=4, model.lora.alpha=8"),
        ({"model__lora__targets": ["q"]}, r"model.lora.targets=\['q', 'k', 'v', "),
        ({"model__lora__rank": None, "model__lora__alpha": 32.0}, r"a run with model.lora.rank=4"),
    ],
)
def test_another_adapters_checkpoint_is_refused(trained, tmp_path, settings, message):
    _, run = trained
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings).restore(run)
    with pytest.raises(UserError, match="holds a run with other settings"):
        trainer(run, train__steps=2, **settings).train(ROWS, letter_share)


def test_another_bases_checkpoint_is_refused(trained, tmp_path):
    _, run = trained
    with pytest.raises(UserError, match="not the model that this run started from"):
        Trainer(config(tmp_path, **LORA), other_base()).restore(run)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Of one update of the whole model."""
    run = tmp_path_factory.mktemp("whole") / "run"
    Trainer(config(run, train__steps=1), load_model("debug")).train(ROWS, letter_share)
    return run


def test_a_whole_models_checkpoint_is_no_adapters(whole_run, tmp_path):
    with pytest.raises(UserError, match=r"of a run with model.lora.rank=null"):
        trainer(tmp_path / "b").restore(whole_run)


# ---- PEFT's files


def logits_of(folder, base, tokens):
    """Of a PEFT adapter by its documented names, with plain PyTorch on transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    root = settings["r"] ** (0.5 if settings.get("use_rslora") else 1)
    model = AutoModelForCausalLM.from_pretrained(base)
    seen = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in settings["target_modules"]:
            a, b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
            seen |= {a, b}
            added = torch.tensor(tensors[b] @ tensors[a]) * settings["lora_alpha"] / root
            module.weight.data += added
    assert seen == tensors.keys()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    """A base model's folder, and that of an adapter of it that was trained here."""
    _, run = trained
    folder = tmp_path_factory.mktemp("peft")
    Trainer(config(folder, model__name="debug")).save_pretrained(folder / "base")
    assert main(["export", str(run), str(folder / "adapter"), "--adapter"]) == 0
    return folder / "base", folder / "adapter"


def test_an_exported_adapter_is_pefts(trained, adapter, tmp_path):
    """Its logits on the base are those of the merged export."""
    from transformers import AutoModelForCausalLM

    (base, folder), (_, run) = adapter, trained
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 128)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (
        32,
        4,
    )
    tokens = np.arange(24).reshape(2, 12)
    assert main(["export", str(run), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = merged(torch.tensor(tokens)).logits.numpy()
        plain = AutoModelForCausalLM.from_pretrained(base)(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(folder, base, tokens), expected, atol=1e-5)
    assert np.abs(plain - expected).max() > 1e-2
    kept = {file.name for file in folder.iterdir()}
    assert {"tokenizer.json", "gvpo_jax_export.json"} <= kept
    assert "config.json" not in kept


def changed(folder, to, tensors=lambda x: x, **settings):
    """A copy of an adapter with other settings or tensors."""
    to.mkdir()
    there = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(there | settings))
    save_file(
        tensors(load_file(folder / "adapter_model.safetensors")), to / "adapter_model.safetensors"
    )
    return to


@pytest.mark.parametrize("rslora", [False, True])
def test_training_starts_from_a_peft_adapter(adapter, tmp_path, rslora):
    """Whatever its scale is; the reference is the model with it."""
    base, folder = adapter
    folder = changed(folder, tmp_path / "peft", use_rslora=rslora, lora_alpha=3)
    settings = {"model__lora__rank": 4, "model__lora__alpha": 5, "model__adapter": str(folder)}
    begun = Trainer(config(tmp_path / "run", model__name=str(base), **settings))
    tokens = np.concatenate([np.repeat(PROMPTS, 2, axis=0), COMPLETIONS.reshape(4, 3)], axis=1)
    logits = logits_of(folder, base, tokens)[:, 3:-1].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(scores, tokens[:, 4:, None], axis=2).reshape(2, 2, 3)
    np.testing.assert_allclose(logps(begun.policy, begun.policy.params), expected, atol=2e-5)
    np.testing.assert_array_equal(
        logps(begun.policy, begun.policy.reference), logps(begun.policy, begun.policy.params)
    )
    fresh = Trainer(config(tmp_path / "run", model__name=str(base), **LORA)).policy
    assert begun.policy.reference_fingerprint != fresh.reference_fingerprint
    assert begun.policy.start_fingerprint != fresh.start_fingerprint


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


def without(word):
    return lambda tensors: {name: x for name, x in tensors.items() if word not in name}


def broken(tensors):
    first = next(iter(tensors))
    return tensors | {first: np.full_like(tensors[first], np.nan)}


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (dict, {"use_dora": True}, "asks for use_dora, which is not supported"),
        (dict, {"bias": "lora_only"}, "asks for bias=lora_only"),
        (dict, {"modules_to_save": ["lm_head"]}, "asks for modules_to_save"),
        (dict, {"rank_pattern": {"q_proj": 2}}, "asks for rank_pattern"),
        (dict, {"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base"),
        (dict, {"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        (dict, {"r": 8}, "adapter of rank 8: give model.lora.rank=8"),
        (without("q_proj"), {}, r"of the layers k,v,o,gate,up,down: give model.lora.targets=\[k,"),
        (without("layers.1"), {}, r"lacks base_model.model.model.layers.1.mlp.down_proj.lora_A"),
        (renamed("layers.1", "layers.2"), {}, "lacks base_model.model.model.layers.1.mlp"),
        (lambda x: x | {"base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32)}, {},
         "holds base_model.model.lm_head.lora_A.weight: it is not an adapter of this model"),
        (lambda x: {k: v[..., :-1].copy() for k, v in x.items()}, {}, "has shape .* asks for"),
        (broken, {}, "holds NaN numbers"),
        (lambda x: {k: v.astype(np.int32) for k, v in x.items()}, {}, "is of type I32"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_a_line(adapter, tmp_path, tensors, settings, message):
    base, folder = adapter
    odd = changed(folder, tmp_path / "odd", tensors, **settings)
    with pytest.raises(UserError, match=message):
        Trainer(config(tmp_path, model__name=str(base), model__adapter=str(odd), **LORA))


@pytest.mark.parametrize(
    ("base", "name", "odd"),
    [
        ("Qwen/Qwen3-0.6B", "models/Qwen3-0.6B/", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "x/SmolLM2-135M-Instruct.Q4_1.gguf", False),
        ("unsloth/gemma-3-1b-it-unsloth-bnb-4bit", "google/gemma-3-1b-it", False),
        (None, "org/name", False),
        ("org/one", "org/other", True),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
    ],
)
def test_an_adapter_of_another_base_is_told(tmp_path, base, name, odd):
    """By the base's name alone: of equal sizes it would fit."""
    settings = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = ModelConfig(name=name, adapter=str(tmp_path), lora=LoraConfig(rank=4))
    told = base_warning(model)
    assert (told is not None) == odd
    if told:
        assert told.startswith(f"{tmp_path} was trained beside {base}, and model.name is {name}: ")


def test_the_base_is_warned_of_in_training(adapter, tmp_path, capsys):
    base, folder = adapter
    odd = changed(folder, tmp_path / "odd", base_model_name_or_path="org/\x1bother")
    Trainer(config(tmp_path, model__name=str(base), model__adapter=str(odd), **LORA))
    told = capsys.readouterr().err
    assert told.startswith(f"gvpo-jax: warning: {odd} was trained beside org/\\x1bother, and mod")


def test_an_adapter_is_looked_for_before_its_base(tmp_path):
    settings = {"model__name": "org/never-asked-for", **LORA}
    with pytest.raises(UserError, match=r"^model\.adapter=/gone: there is no such folder$"):
        Trainer(config(tmp_path, model__adapter="/gone", **settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model__lora__alpha": 8}, r"^model\.lora\.alpha: without model\.lora\.rank the whole"),
        ({"model__lora__targets": ["q"]}, r"^model\.lora\.targets: without"),
        ({"rollout__adapter": "apart"}, r"^rollout\.adapter=apart is for models with an adapter"),
    ],
)
def test_settings_of_an_adapter_need_its_rank(tmp_path, settings, told):
    with pytest.raises(UserError, match=told):
        config(tmp_path, **settings)


def test_an_adapter_that_is_none_is_a_line(adapter, tmp_path, capsys):
    """Also as the command's status; before any weights are read."""
    base, folder = adapter
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    for name, message in (
        ("empty", "holds no adapter_config.json, so it is not a PEFT adapter"),
        ("pickled", "holds a pickled adapter, which is never opened"),
        ("nowhere", "could not be downloaded"),
    ):
        settings = {
            "model__adapter": str(tmp_path / name) if name != "nowhere" else "no-one/nowhere"
        }
        with pytest.raises(UserError, match=message):
            Trainer(config(tmp_path, model__name=str(base), **LORA, **settings))
    with pytest.raises(UserError, match=r"it is an adapter: give it as model\.adapter"):
        Trainer(config(tmp_path, model__name=str(folder)))
    (tmp_path / "c.yaml").write_text(f"model: {{adapter: {folder}}}\n")
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "is trained on with LoRA: give model.lora.rank" in told[0]


# ---- families

SIZES = (64, 16, 32, 2, 4, 2, 8)  # vocabulary, widths, layers, heads


def test_a_mixture_has_adapters_beside_its_attention_alone():
    experts = Experts(count=4, per_token=2, intermediate_size=8, normalised=True)
    shape = DecoderConfig("qwen3_moe", *SIZES, qk_norm=True, experts=experts)
    base = param_shapes(shape)
    refusal = r"no layer gate that can have an adapter \(experts can't\); .* it has q"
    with pytest.raises(UserError, match=refusal):
        adapter_shapes(base, Lora(2, 4.0, ("q", "gate")))
    lora = Lora(2, 4.0, ("q", "k", "v", "o"))
    adapter = adapter_shapes(base, lora)
    assert adapter == adapter_shapes(base, Lora(2, 4.0, tuple(TARGETS)))  # the default
    both = init_params(shape, 0), init_adapter(adapter, 0)
    arrays = (BATCH["prompts"], BATCH["prompt_lengths"], BATCH["completions"])
    hidden = [
        jax.jit(decoder_fns(shape, DecoderOptions(lora=form)).completion_hidden)(params, *arrays)
        for form, params in ((None, both[0]), (lora, join(*both)))
    ]
    np.testing.assert_array_equal(*hidden)
    assert as_peft(shape, lora) == lora


def test_what_peft_would_take_for_experts_is_not_written(tmp_path):
    """Adapters beside a mixture's shared expert: they are trained, and merged."""
    experts = Experts(count=4, per_token=2, intermediate_size=8, normalised=True, shared_size=8)
    shape, lora = DecoderConfig("qwen2_moe", *SIZES, experts=experts), Lora(2, 4.0, tuple(TARGETS))
    model = dataclasses.replace(load_model("debug"), config=shape)
    adapter = init_adapter(adapter_shapes(param_shapes(shape), lora), 0)
    assert "shared" in adapter["layers"][0]["mlp"]
    with pytest.raises(UserError, match=r"^PEFT takes adapters of down, gate, up in a mixture"):
        export_adapter(tmp_path / "out", model, adapter, lora)
    assert not (tmp_path / "out").exists()
    assert as_peft(shape, lora) is None


def test_servers_get_no_adapter_of_fused_tensors():
    """Its rank would be another one than a server was started with."""
    shape, lora = DecoderConfig("phi3", *SIZES), Lora(2, 4.0, tuple(TARGETS))
    assert as_peft(shape, lora) is None
    assert as_peft(shape, dataclasses.replace(lora, targets=("o", "down"))) is not None
    assert as_peft(shape, None) is None


# ---- what is compiled for a TPU


@pytest.mark.parametrize("sampled", ["merged", "apart"])
def test_programs_are_lowered_with_what_lies_beside_them(tmp_path, sampled):
    """To the byte, from trees that are really made."""
    it = trainer(tmp_path, rollout__adapter=sampled)
    shape, mesh = it.model.config, it.config.mesh.mesh()
    programs = {program.name: program for program in run_programs(it.config, shape, mesh)}

    def size(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    state, reference, base = (
        size(x) for x in (it.policy.state, it.policy.reference, it.policy.frozen)
    )
    weights = it.engine.model.prepare(it.policy.params, it.policy.frozen)
    held = {id(x) for x in jax.tree.leaves((it.policy.params, it.policy.frozen))}
    shared = size([x for x in jax.tree.leaves(weights) if id(x) in held])
    assert (shared < base) == (sampled == "merged")
    assert programs["train step"].beside == reference
    assert programs["reference scoring"].beside == state
    assert programs["rollout: decode"].beside == state + reference + base - shared
    for program in programs.values():
        program.lower()


# ---- servers


@pytest.mark.parametrize("enabled", [True, False])
def test_servers_get_the_adapter_alone_where_they_take_it(tmp_path, caplog, enabled):
    """Else merged weights; the handshake compares either with what the trainer computes."""
    model = load_model("debug")
    network, lora = network_of(model.config), Lora(4, 8.0, tuple(TARGETS))

    def with_adapter(folder):
        kernels = merge(model.params, read_adapter(folder, model.config, lora), SCALE, np.float32)
        return network(join(model.params, kernels))

    with StubServer(
        network(model.params), lambda folder: network(load_model(folder).params)
    ) as stub:
        stub.load_adapter = with_adapter if enabled else None
        it = trainer(
            tmp_path, servers__kind="vllm", servers__urls=[stub.url], servers__retries=0,
            rollout__top_k=4, train__steps=3,
        )  # fmt: skip
        it.train(ROWS, letter_share)
        names = [
            body["lora_name"] for path, body in stub.requests if path.endswith("/load_lora_adapter")
        ]
        asked = [body.get("model") for path, body in stub.requests if path == "/v1/completions"]
        paths = stub.paths()
        if enabled:
            assert len(names) == 3
            assert set(names) == set(asked)
            assert list(stub.adapters) == names[-1:]  # the others were forgotten
            assert "/collective_rpc" not in paths
        else:
            assert paths.count("/v1/load_lora_adapter") == 1
            assert set(asked) == {None}
            assert paths.count("/collective_rpc") == 3
    assert ("LoRA not enabled" in caplog.text) == (not enabled)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert [row["sync/logp_difference/max"] < 1e-4 for row in rows] == [True] * 3
    newest = max((tmp_path / "weights").iterdir())
    assert (newest / "adapter_model.safetensors").is_file() == enabled


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank=0"], "model.lora.rank must be at least 1, got 0"),
        (["rank=33"], r"rank=33 is more than the width of layer k, which is 64 x 32"),
        (["rank=4", "alpha=0"], "model.lora.alpha must be > 0"),
        (["rank=4", "targets=[q, w]"], "model.lora.targets: 'w' is no layer"),
        (["rank=4", "targets=[]"], "model.lora.targets is empty"),
        (["rang=4"], "unknown setting model.lora.rang: did you mean 'rank'?"),
    ],
)
def test_settings_that_make_no_adapter_are_a_line(tmp_path, settings, message):
    (tmp_path / "c.yaml").write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    given = [f"model.lora.{setting}" for setting in settings]
    with pytest.raises(UserError, match=message):
        Trainer(load_config(tmp_path / "c.yaml", given))


def test_settings_of_an_adapter_survive_the_file(tmp_path):
    given = override(Config(), **LORA, model__lora__targets=["q_proj", "down"])
    (tmp_path / "c.yaml").write_text(to_yaml(given))
    assert load_config(tmp_path / "c.yaml") == given
    assert given.model.lora.form() == Lora(4, 8.0, ("q", "down"))
    assert Config().model.lora.form() is None


def test_a_run_without_an_adapter_exports_none(whole_run, tmp_path, capsys):
    assert main(["export", str(whole_run), str(tmp_path / "out"), "--adapter"]) == 2
    assert "trains the whole model, without an adapter" in capsys.readouterr().err


# ---- PEFT itself, where it is installed

# peft 0.21 asks transformers 5.24 for what goes by another name now.
by_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def pefts_logits(folder, base, tokens):
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@by_peft
def test_peft_loads_our_adapter(adapter):
    base, folder = adapter
    tokens = np.arange(24).reshape(2, 12)
    expected = logits_of(folder, base, tokens)
    np.testing.assert_allclose(pefts_logits(folder, base, tokens), expected, atol=1e-5)


@by_peft
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts_adapter(adapter, tmp_path, rslora):
    """One that PEFT made and saved, with layers and a scale of its own choice."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    asked = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["v_proj", "o_proj", "up_proj"], use_rslora=rslora,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(adapter[0])
    peft.get_peft_model(base, asked).save_pretrained(tmp_path / "theirs")
    ours = Trainer(
        config(
            tmp_path / "run", model__name=str(adapter[0]), model__adapter=str(tmp_path / "theirs"),
            model__lora__rank=3, model__lora__targets=["v", "o", "up"],
        )
    )  # fmt: skip
    ours.save_pretrained(tmp_path / "merged")
    tokens = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        found = merged(torch.tensor(tokens)).logits.numpy()
    expected = pefts_logits(tmp_path / "theirs", adapter[0], tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    plain = logits_of(adapter[1], adapter[0], tokens)
    assert np.abs(found - plain).max() > 0.1


def merged_logits(case, adapter, lora, tokens):
    merged = join(case.ours.params, merge(case.ours.params, adapter, lora.scale, jnp.float32))
    return jax.jit(functools.partial(full_logits, case.ours.config))(merged, tokens)


@by_peft
@pytest.mark.parametrize(
    ("family", "targets", "layers", "rank"),
    [
        ("phi3", TARGETS, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, 6),
        ("phi3", ["q", "v", "down"], {"qkv_proj", "down_proj"}, 4),
        ("qwen3_moe", TARGETS, {"q_proj", "k_proj", "v_proj", "o_proj"}, 2),
    ],
)
def test_peft_loads_adapters_of_fused_tensors_and_of_mixtures(
    tmp_path, monkeypatch, family, targets, layers, rank
):
    changes = {"mlp_only_layers": []} if family == "qwen3_moe" else {}  # no dense layer
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | changes)
    case, lora = Case(family, tmp_path / "base"), Lora(2, 5.0, tuple(targets))
    draw = np.random.default_rng(0).normal
    shapes = adapter_shapes(param_shapes(case.ours.config), lora)
    adapter = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32) / 4, shapes)
    export_adapter(tmp_path / "adapter", case.ours, adapter, lora)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (set(settings["target_modules"]), settings["r"]) == (layers, rank)
    tokens = np.arange(24).reshape(2, 12)
    expected = merged_logits(case, adapter, lora, tokens)
    found = pefts_logits(tmp_path / "adapter", tmp_path / "base", tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if targets is TARGETS:
        again = dataclasses.replace(lora, rank=rank)
        adapter = read_adapter(str(tmp_path / "adapter"), case.ours.config, again)
        logits = merged_logits(case, adapter, again, tokens)
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@by_peft
def test_we_load_pefts_adapter_of_fused_tensors(tmp_path):
    """Each layer in a tensor gets A, and its rows of B."""
    torch.manual_seed(0)
    case = Case("phi3", tmp_path / "base")
    asked = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["qkv_proj", "gate_up_proj", "o_proj"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.get_peft_model(case.torch, asked).save_pretrained(tmp_path / "theirs")
    lora = Lora(3, 7.0, ("q", "k", "v", "o", "gate", "up"))
    adapter = read_adapter(str(tmp_path / "theirs"), case.ours.config, lora)
    tokens = np.arange(24).reshape(2, 12)
    expected = pefts_logits(tmp_path / "theirs", tmp_path / "base", tokens)
    np.testing.assert_allclose(merged_logits(case, adapter, lora, tokens), expected, atol=1e-4)
    with pytest.raises(UserError, match=r"layers q,k,v,o,gate,up: give model\.lora\.targets=\[q,k"):
        read_adapter(str(tmp_path / "theirs"), case.ours.config, Lora(3, 7.0, ("q", "o", "up")))
