"""What a run needs, against arrays that are really made and numbers by hand; who is told what."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh
from small_run import config

from gvpo_jax import memory
from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, override
from gvpo_jax.errors import UserError
from gvpo_jax.memory import check_memory, device_memory, memory_needed, peak
from gvpo_jax.models.debug import debug_config
from gvpo_jax.models.decoder import decoder_fns, init_params
from gvpo_jax.models.known import model_shape
from gvpo_jax.tpu_compile.lowering import batch_sizes
from gvpo_jax.trainer import Trainer

GIB = 2**30
REPORTS = Path(__file__).parents[2] / "experiments/tpu_compile/reports"


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_what_stays_in_memory_is_counted_to_the_byte(name):
    c = override(Config(), optimizer__name=name, mesh__fsdp=1)
    params = init_params(debug_config(), 0)
    needed = memory_needed(c, debug_config(), c.mesh.mesh())
    assert needed["parameters"] == needed["gradients"] == needed["reference"] == bytes_of(params)
    twice = memory_needed(override(c, train__micro_batches=2), debug_config(), c.mesh.mesh())
    assert twice["gradients"] == 2 * needed["gradients"]
    state = c.optimizer.create(c.train.updates).init(params)
    assert needed["optimizer state"] == bytes_of(state)


def test_the_published_sizes_of_a_model_of_7b():
    """7.6e9 parameters of 4 bytes; AdamW keeps two numbers more of each."""
    c = override(
        Config(), model__dtype="bfloat16", mesh__fsdp=1, rollout__max_completion_length=1024,
        data__max_prompt_length=512, train__batch_size=8, rollout__num_generations=4,
    )  # fmt: skip
    needed = memory_needed(c, model_shape("Qwen/Qwen2.5-Math-7B"), c.mesh.mesh())
    assert needed["parameters"] == pytest.approx(7.616e9 * 4, rel=1e-3)
    assert needed["optimizer state"] == pytest.approx(7.616e9 * 8, rel=1e-3)
    assert needed["reference"] == pytest.approx(7.616e9 * 2, rel=1e-3)
    # keys and values, 28 layers, 4 heads of 128, 2 bytes; 8 prompts and 32 completions
    assert needed["keys and values"] == 2 * 28 * 4 * 128 * 2 * (8 * 512 + 32 * 1024)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_layers_that_are_scanned_are_held_once_more_in_the_computations_dtype(dtype, width):
    c = override(Config(), model__dtype=dtype, mesh__fsdp=1, model__scan_layers=True)
    needed = memory_needed(c, debug_config(), c.mesh.mesh())
    layers = init_params(debug_config(), 0)["layers"]
    assert needed["stacked layers"] == width * sum(x.size for x in jax.tree.leaves(layers))
    without = {name: size for name, size in needed.items() if name != "stacked layers"}
    assert peak(needed, together=True) == peak(without, together=True) + needed["stacked layers"]
    assert without == memory_needed(
        override(c, model__scan_layers=False), debug_config(), c.mesh.mesh()
    )


def test_keys_and_values_of_layers_that_differ():
    """Wider heads where there is no window, and a last layer that has none of its own."""
    windows = (4, None, None)
    model = dataclasses.replace(
        debug_config(), num_layers=3, windows=windows, full_head_dim=24, shared_layers=1
    )
    c = override(Config(), mesh__fsdp=1)
    rollout, prompts = batch_sizes(c)["rollout"], c.data.max_prompt_length
    per_token = decoder_fns(model).empty_cache(1, 1, 1)
    tokens = rollout.groups * (prompts + rollout.k * rollout.t)
    assert model.source(2) == 1
    needed = memory_needed(c, model, c.mesh.mesh())
    assert needed["keys and values"] == tokens * bytes_of(per_token)


def test_it_is_at_most_what_the_tpu_compiler_says(tmp_path):
    """The recipes of experiments/tpu_compile: a warning that these may not fit would be wrong."""
    ratios = {}
    for file in sorted(REPORTS.glob("*.json")):
        report = json.loads(file.read_text())
        if len(report["programs"]) < 4:
            continue  # of the update alone
        (tmp_path / "c.yaml").write_text(json.dumps(report["config"]))
        c = load_config(tmp_path / "c.yaml")
        mesh = AbstractMesh(tuple(report["mesh"].values()), tuple(report["mesh"]))
        needed = peak(memory_needed(c, model_shape(c.model.name), mesh), together=False)
        ratios[file.stem] = needed / max(p["hbm"]["peak"] for p in report["programs"])
    assert len(ratios) >= 7
    assert max(ratios.values()) <= 1, ratios
    assert min(ratios.values()) > 0.4, ratios


def test_without_updates_only_evaluation_needs_memory():
    """28 layers, 4 heads of 128, 2 bytes; 16 prompts with 4 completions each."""
    c = override(
        Config(), model__dtype="bfloat16", mesh__fsdp=1, rollout__max_completion_length=1024,
        data__max_prompt_length=512, data__eval_path="held_out.jsonl", train__batch_size=512,
    )  # fmt: skip
    shape = model_shape("Qwen/Qwen2.5-Math-7B")
    needed = memory_needed(c, shape, c.mesh.mesh(), trains=False)
    assert set(needed) == {"parameters", "reference", "keys and values"}
    assert needed["keys and values"] == 2 * 28 * 4 * 128 * 2 * (16 * 512 + 64 * 1024)
    c = override(c, data__eval_path=None)
    assert memory_needed(c, shape, c.mesh.mesh(), trains=False)["keys and values"] == 0


def test_sampling_and_training_need_memory_together_only_with_lookahead():
    items = {"parameters": 1, "gradients": 2, "activations": 3, "keys and values": 4}
    assert peak(items, together=False) == 1 + 5
    assert peak(items | {"keys and values": 7}, together=False) == 1 + 7
    assert peak(items, together=True) == 1 + 5 + 4


def test_more_devices_hold_less_each():
    one, eight = (override(Config(), mesh__fsdp=n) for n in (1, 8))
    shape = model_shape("Qwen/Qwen2.5-0.5B")
    alone, cut = (memory_needed(c, shape, c.mesh.mesh()) for c in (one, eight))
    assert alone["parameters"] / cut["parameters"] == pytest.approx(8, rel=0.01)
    assert device_memory(one.mesh.mesh()) // 8 == device_memory(eight.mesh.mesh())


def test_heads_are_cut_along_tensor_where_they_divide():
    def cache(name, **mesh):
        c = override(Config(), **{f"mesh__{axis}": n for axis, n in mesh.items()})
        return memory_needed(c, model_shape(name), c.mesh.mesh())["keys and values"]

    # 2 key-value heads, and 3
    divides, does_not = "Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M"
    assert cache(divides, fsdp=4, tensor=2) == cache(divides, fsdp=8)
    assert cache(does_not, fsdp=4, tensor=2) == 2 * cache(does_not, fsdp=8)


def told(monkeypatch, capfd, available, *, trains=True, **settings):
    """What is said of Qwen2.5 0.5B (1.84 GiB of parameters) where a device has so many GiB."""
    monkeypatch.setattr(memory, "device_memory", lambda mesh: int(available * GIB))
    c = override(Config(), model__name="Qwen/Qwen2.5-0.5B", mesh__fsdp=1, **settings)
    check_memory(c, model_shape(c.model.name), c.mesh.mesh(), trains=trains)
    return capfd.readouterr().err


def test_what_may_not_fit_is_warned_of_with_the_largest_item(monkeypatch, capfd):
    line = told(monkeypatch, capfd, 10)
    assert line.startswith("gvpo-jax: warning: this run may not fit: it needs ")
    assert "a device has 10 GiB; the largest part are " in line
    assert line.count("\n") == 1
    small = {"data__max_prompt_length": 8, "rollout__max_completion_length": 8}
    line = told(monkeypatch, capfd, 6, train__batch_size=1, **small)
    assert "the largest part are optimizer state (3.68 GiB): smaller with optimizer.name" in line
    long = {"rollout__max_completion_length": 20000}
    line = told(monkeypatch, capfd, 10, **long)
    assert "the largest part are activations (" in line
    assert "smaller with train.micro_batches, or model.remat=layer" in line
    assert told(monkeypatch, capfd, 1000) == ""


def test_only_what_cant_fit_at_all_is_refused(monkeypatch, capfd):
    """1.84 GiB of parameters and 3.68 of moments."""
    with pytest.raises(UserError, match=r"optimizer state alone need 5\.52 GiB .* has 5 GiB"):
        told(monkeypatch, capfd, 5)
    long = {"rollout__max_completion_length": 20000}  # activations are the largest, and no cure
    with pytest.raises(UserError, match=r"smaller with optimizer\.name"):
        told(monkeypatch, capfd, 5, **long)
    assert "may not fit" in told(monkeypatch, capfd, 5.6)
    assert "may not fit" in told(monkeypatch, capfd, 5, optimizer__name="adafactor")
    assert told(monkeypatch, capfd, 5, trains=False) == ""
    with pytest.raises(UserError, match=r"fit: its parameters alone need 1\.84 GiB .* has 1 GiB"):
        told(monkeypatch, capfd, 1, trains=False)


def test_a_model_is_not_read_where_it_cant_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 1000)
    monkeypatch.setattr("gvpo_jax.models.load.read_params", None)  # is not called
    with pytest.raises(UserError, match=r"^debug does not fit: parameters and optimizer state"):
        Trainer(config(tmp_path))


def test_where_nothing_tells_the_memory_nothing_is_said(monkeypatch, capfd):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: None)
    c = override(Config(), mesh__fsdp=1)
    check_memory(c, debug_config(), c.mesh.mesh(), trains=True)
    assert capfd.readouterr().err == ""


def test_fine_tuning_samples_nothing():
    sampled = override(Config(), data__eval_size=0)
    learnt = override(sampled, loss__name="sft")
    mesh = sampled.mesh.mesh(jax.devices()[:1])
    of = [memory_needed(c, debug_config(), mesh) for c in (sampled, learnt)]
    assert of[0]["keys and values"] > of[1]["keys and values"] == 0
    assert of[0]["activations"] > of[1]["activations"]  # k completions of a prompt, or one
