"""`gvpo-jax compile`: programs compiled for TPUs that are not there, and what is read from them."""

import dataclasses
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gvpo_jax.cli import main
from gvpo_jax.config_file import load_config
from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import param_shapes
from gvpo_jax.models.known import KNOWN, model_shape
from gvpo_jax.tpu_compile import report as compile_report
from gvpo_jax.tpu_compile import roofline
from gvpo_jax.tpu_compile.clock import clock_of
from gvpo_jax.tpu_compile.hlo import Collective, collectives, loops, memory
from gvpo_jax.tpu_compile.lowering import batch_sizes, run_programs
from gvpo_jax.tpu_compile.report import compile_run
from gvpo_jax.tpu_compile.text import as_text

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OVERRIDES = [
    "train.batch_size=4",
    "rollout.num_generations=2",
    "rollout.max_completion_length=8",
    "model.dtype=bfloat16",
]
TOPOLOGY = "v5e:2x2"

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum.1 = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: f32[64]) -> f32[16] {
  %all-reduce.9 = f32[64]{0:T(256)} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = f32[16]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={16}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  %all-gather.2 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%y), channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %z)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="state.params[\\'embed\\']"}
  %fusion.1 = f32[16]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.2 = (f32[4,4]{1,0:T(8,128)}, f32[2]{0}) all-reduce(%a, %b), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %permute = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %while.1 = (s32[], f32[8,4]{1,0}) while(%init), condition=%cond, body=%body
}
"""  # noqa: E501

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[8,4]| at ShapeIndex {}, maybe-live-out:
 value: <1 a @0> (size=4096,offset=0): f32[8,4]{1,0:T(8,128)}
allocation 1: size 512, parameter 1, shape |f32[2]| at ShapeIndex {}:
 value: <2 b @0> (size=512,offset=0): f32[2]{0}
allocation 2: size 1024, output shape is |f32[2]|, maybe-live-out:
 value: <3 all-reduce.2{1} @0> (size=1024,offset=0): f32[2]{0}
allocation 3: size 9000, preallocated-temp:
 value: <4 all-gather.1 @0> (size=6000,offset=0): bf16[8,4]{1,0}
 value: <5 all-gather.2 @0> (size=6000,offset=0): bf16[8,4]{1,0}
 value: <6 fusion.1 @0> (size=3000,offset=6000): f32[16]{0}
allocation 4: size 7777, color 1, preallocated-temp:
 value: <7 vmem @1> (size=7777,offset=0): f32[16]{0:S(1)}

Total bytes used: 22409
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "config.json"
    file.write_text(json.dumps(TINY))
    return file


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    """Of a whole run, by the command in a process of its own."""
    out = tmp_path_factory.mktemp("out") / "report.json"
    command = [sys.executable, "-m", "gvpo_jax", "compile", "debug", "--topology", TOPOLOGY]
    options = ["--model-config", str(tiny), "--out", str(out)]
    done = subprocess.run([*command, *options, *OVERRIDES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train step: fits" in done.stdout
    return json.loads(out.read_text())


def program(report, name):
    return next(row for row in report["programs"] if row["name"] == name)


def test_every_program_of_a_run_is_compiled(report):
    names = ["train step", "reference scoring", "rollout: prefill", "rollout: decode"]
    assert [row["name"] for row in report["programs"]] == names
    assert report["devices"] == 4
    assert report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert report["fits"] is True
    for row in report["programs"]:
        hbm = row["hbm"]
        assert row["cost_analysis"]["flops"] > 0
        assert hbm["aliased"] <= min(hbm["arguments"], hbm["outputs"])
        assert hbm["temporaries"] > 0
        assert hbm["peak"] == hbm["total"] + hbm["beside"]
        parts = ("arguments", "outputs", "temporaries", "constants")
        assert hbm["total"] >= sum(hbm[part] for part in parts) - hbm["aliased"]
        assert row["seconds"]["estimate"] == max(
            row["seconds"][limit] for limit in ("compute", "hbm", "ici", "dcn")
        )
        assert 0 < row["mfu"] < 1
        clock = row["clock"]
        assert clock["seconds"] == pytest.approx(sum(clock["parts"].values()))
        assert clock["seconds"] > clock["cycles"] / 1.5e9 > 0
        assert 0 < clock["mfu"] < row["flops"]["model"] / 4 / 197e12 / clock["seconds"] * 1.001
        assert 0 < len(clock["sources"]) <= 10
    update = program(report, "train step")["clock"]["parts"]
    assert all(update[part] > 0 for part in ("products", "logits", "optimizer", "collectives"))
    assert report["programs"][1]["clock"]["parts"]["optimizer"] == 0


@pytest.mark.parametrize(("chip", "topology"), [("v5e", "1x1"), ("v5p", "2x2x1"), ("v6e", "1x1")])
def test_a_products_time_is_what_its_cycles_say_and_near_the_peak(chip, topology):
    """One instruction, so that nothing has to be added up; also the proof of the clock rates."""
    _, devices = compile_report.tpu_devices(f"{chip}:{topology}")
    place = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((4096, 4096), "bfloat16", sharding=place)
    text = jax.jit(lambda a, b: a @ b).lower(x, x).compile().as_text()
    (cycles,) = map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))
    clock = clock_of(text, roofline.CHIPS[chip])
    assert clock is not None
    assert clock.cycles == cycles
    assert clock.parts["products"] == clock.seconds == cycles / roofline.CHIPS[chip].clock
    at_peak = 2 * 4096**3 / roofline.CHIPS[chip].flops
    assert at_peak < clock.seconds < 1.2 * at_peak


def expected_bytes():
    """By hand: the matrices are cut into four, as float32; norms lie whole on every chip."""
    d, v, ff, kv = 64, 256, 128, 32
    matrices = 2 * v * d + 2 * d * d + 2 * d * kv + 3 * d * ff
    return 4 * (matrices // 4 + 3 * d)


def test_arguments_are_the_parameters_and_both_moments(report):
    """XLA rounds each buffer up to whole tiles, so its sum is larger, but not by much."""
    params = expected_bytes()
    held = program(report, "train step")["hbm"]["arguments"]
    assert 3 * params <= held < 3.6 * params + 60 * 1024
    for name, bytes_ in (("reference scoring", params / 2), ("rollout: prefill", params)):
        assert bytes_ <= program(report, name)["hbm"]["arguments"] < 1.2 * bytes_ + 30 * 1024


def test_beside_each_program_lies_the_rest_of_the_run(report):
    params = expected_bytes()
    counters = 64
    train, score, prefill, decode = (row["hbm"]["beside"] for row in report["programs"])
    assert train == params / 2  # the reference, in bfloat16
    assert 3 * params < score < 3 * params + counters  # the state
    assert 2.5 * params < prefill < 2.5 * params + counters  # both moments and the reference
    assert prefill == decode


def test_fsdp_gathers_parameters_and_scatters_gradients(report):
    kinds = {c["kind"] for c in program(report, "train step")["collectives"]}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce"}
    assert all(not c["between_slices"] for row in report["programs"] for c in row["collectives"])


def test_no_device_holds_or_moves_the_whole_batch(report):
    """Left alone, XLA cut the hidden axis instead: 60 GiB a chip and 18 TiB a step for 7B."""
    params = expected_bytes()
    moved = sum(c["wire_bytes"] for c in program(report, "train step")["collectives"])
    assert moved < 4 * 4 * params  # a few times the parameters; the batch would be far more


def test_a_copy_of_the_weights_spares_collecting_them_for_each_token(tiny, tmp_path):
    moved = []
    for tensor in ("null", "1"):
        out = tmp_path / f"{tensor}.json"
        options = ["--model-config", str(tiny), "--only", "rollout", "--out", str(out)]
        settings = [*OVERRIDES, f"rollout.tensor={tensor}"]
        assert main(["compile", "debug", "--topology", TOPOLOGY, *options, *settings]) == 0
        decode = program(json.loads(out.read_text()), "rollout: decode")
        moved.append(sum(c["wire_bytes"] for c in decode["collectives"]))
    assert moved[1] < moved[0] / 10


def test_lanes_move_nothing_between_chips_and_a_small_cache_is_small(tiny, tmp_path):
    """Four lanes, one a chip; two completions of each of their two groups, one at a time."""
    rows = {}
    for name, more in {
        "at once": [],
        "lanes": ["rollout.slots=4"],
        "int8": ["rollout.slots=4", "rollout.cache_dtype=int8"],
    }.items():
        out = tmp_path / "report.json"
        options = ["--model-config", str(tiny), "--only", "rollout", "--out", str(out)]
        settings = [*OVERRIDES, "rollout.tensor=1", "train.batch_size=8", *more]
        assert main(["compile", "debug", "--topology", TOPOLOGY, *options, *settings]) == 0
        rows[name] = program(json.loads(out.read_text()), "rollout: decode")
    moved = {name: sum(c["wire_bytes"] for c in row["collectives"]) for name, row in rows.items()}
    steps = {name: row["main_loop"] for name, row in rows.items()}
    assert steps == {"at once": 8, "lanes": 32, "int8": 32}  # one completion after the other
    assert moved["lanes"] <= 32 * steps["lanes"]  # whether any goes on, and is there more
    assert moved["int8"] == moved["lanes"]
    held = {name: row["hbm"]["arguments"] for name, row in rows.items()}
    assert held["int8"] < held["lanes"]


def test_sampling_ahead_lies_beside_an_update(tiny):
    """A snapshot of the parameters, and the cache with all that goes with it."""
    shape, beside = model_shape("", str(tiny)), {}
    for name, more in {
        "after": [],
        "ahead": ["rollout.lookahead=1"],
        "lanes": ["rollout.lookahead=1", "rollout.slots=4"],
    }.items():
        config = load_config("debug", [*OVERRIDES, *more])
        programs = run_programs(config, shape, config.mesh.mesh(jax.devices()[:4]))
        beside[name] = programs[0].beside
    keys_and_values = 2 * 2 * 2 * 16 * 2  # both, of a token: 2 heads of 16, in bfloat16, k of 2
    assert beside["ahead"] - beside["after"] > expected_bytes() + 8 * keys_and_values
    assert beside["after"] < beside["lanes"] < beside["ahead"]


@pytest.mark.parametrize("tensor", ["1", "null"])
def test_decoding_reads_weights_and_cache_once_for_each_token(tiny, tensor):
    """Of a whole round, by hand, in bfloat16; the embedding is looked up, and the head read."""
    more = ["train.steps_per_generation=3", "data.max_prompt_length=24"]
    config = load_config("debug", [*OVERRIDES, *more, f"rollout.tensor={tensor}"])
    programs = run_programs(config, model_shape("", str(tiny)), config.mesh.mesh(jax.devices()[:4]))
    d, v, ff, kv = 64, 256, 128, 32
    matrices = v * d + 2 * d * d + 2 * d * kv + 3 * d * ff
    weights = (matrices if tensor == "1" else matrices // 4) + 3 * d  # or each chip's share
    groups = 3 * 4 // 4  # on each of four devices
    keys_and_values = groups * (24 + 2 * 8) * 2 * kv
    mask = groups * 24
    assert programs[-1].name == "rollout: decode"
    assert programs[-1].reads == 2 * (weights + keys_and_values) + mask


def test_prompts_that_do_not_divide_are_filled_up_to_sample(tiny):
    """As in a run: three rounds of seven prompts on four devices are 24."""
    more = ["train.batch_size=8", "replay.groups=1", "train.steps_per_generation=3"]
    config = load_config("debug", [*OVERRIDES, *more, "rollout.num_generations=3"])
    mesh = config.mesh.mesh(jax.devices()[:4])
    prefill = run_programs(config, model_shape("", str(tiny)), mesh)[2]
    prompts = jax.tree.leaves(prefill.lower().args_info)[-2]
    assert prompts.shape == (24, 32)


def test_where_servers_sample_there_is_nothing_to_decode(tiny):
    servers = ["servers.kind=vllm", "servers.urls=[http://localhost:8000]"]
    config = load_config("debug", [*OVERRIDES, *servers])
    programs = run_programs(config, model_shape("", str(tiny)), config.mesh.mesh(jax.devices()[:4]))
    assert [program.name for program in programs] == ["train step", "reference scoring"]


def test_what_does_not_fit_ends_with_status_one(tmp_path, capsys):
    """The compiler itself gives up here; its dump still says what was too large."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"vocab_size": 2**25, "hidden_size": 512, "head_dim": 16}))
    out = tmp_path / "new" / "report.json"
    options = ["--model-config", str(file), "--out", str(out), "--only", "rollout"]
    assert main(["compile", "debug", "--topology", TOPOLOGY, *options, *OVERRIDES]) == 1
    shown = capsys.readouterr().out
    row = json.loads(out.read_text())["programs"][0]
    assert "Ran out of memory" in row["error"]
    assert row["fits"] is False
    assert row["hbm"]["peak"] > row["hbm"]["usable"] == 15.75 * 2**30
    assert "params['embed']" in row["largest"][0]["origin"] + row["largest"][1]["origin"]
    for word in ("DOES NOT FIT", "largest buffers", "train.batch_size", "more chips"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v9z:2x2"], "v5e:4x4"),
        (["--topology", "v5e"], "v5e:4x4"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices must be at least 1, got 0"),
        (["--topology", "v5e:3x3"], "there is no topology v5e:3x3"),
        (
            ["--topology", TOPOLOGY, "train.batch_size=3", "rollout.num_generations=3"],
            "use a multiple of 4 groups",
        ),
        (["--topology", TOPOLOGY, "model.name=a/b"], "--model-config"),
        (["--topology", TOPOLOGY, "--model-config", "none.json"], "there is no file none.json"),
        (["--topology", TOPOLOGY, "--wrong"], "unrecognized arguments: --wrong"),
        (["--topology", TOPOLOGY, "mesh.fsdp=3", "mesh.tensor=2"], "does not fit 4 devices"),
        (["--topology", TOPOLOGY, "data.max_prompt_length=9000"], "made for 2048"),
    ],
)
def test_mistakes_are_one_line_and_status_two(arguments, words, capsys):
    assert main(["compile", "debug", *arguments]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


def test_one_chip_is_a_topology_too(tiny, capsys):
    options = ["--topology", "v5e:1x1", "--model-config", str(tiny), "--only", "reference"]
    assert main(["compile", "debug", *options, *OVERRIDES]) == 0
    assert "on v5e:1x1: 1 chips" in capsys.readouterr().out


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compile_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gvpo-jax\[compile\]'"):
        compile_run(load_config("debug"), TOPOLOGY)


def test_collectives_count_loops_and_join_the_pieces_of_a_channel():
    found = {c.kind: c for c in collectives(HLO, devices=4)}
    assert loops(HLO) == {"body": 5}
    gather = found["all-gather"]  # 2 pieces of 1 channel, 5 rounds, 8 x 4 bfloat16, half received
    assert (gather.devices, gather.count, gather.bytes) == (2, 5, 5 * 64)
    assert gather.wire_bytes == 5 * 64 / 2
    reduce = found["all-reduce"]  # 16 + 2 float32, over 2 devices
    assert (reduce.devices, reduce.count, reduce.bytes) == (2, 1, 72)
    assert reduce.wire_bytes == 72
    scatter = found["reduce-scatter"]  # TPU's fusion: 64 float32 over 4 devices
    assert (scatter.devices, scatter.bytes, scatter.wire_bytes) == (4, 64, 192)
    permute = found["collective-permute"]  # of (operand, result, ...) the result alone
    assert (permute.count, permute.bytes, permute.wire_bytes) == (1, 32, 32)


def test_groups_over_slices_are_told_from_those_within():
    """Slices are devices 0, 1 and 2, 3: 'b' and {0,1} stay inside, T(1,0) and {0,1,2,3} do not."""
    found = {c.kind: c.between_slices for c in collectives(HLO, devices=4, slices=2)}
    assert found == {
        "all-gather": False,
        "all-reduce": True,
        "reduce-scatter": True,
        "collective-permute": False,
    }


def test_memory_counts_donated_arguments_once():
    held, largest = memory(ASSIGNMENT, HLO)
    assert (held["arguments"], held["outputs"], held["aliased"]) == (4608, 5120, 4096)
    assert (held["temporaries"], held["constants"]) == (9000, 0)
    assert held["total"] == 4096 + 512 + 1024 + 9000  # nothing of the vector memory
    first, second, third = largest[:3]
    assert (first.bytes, first.count, first.origin) == (6000, 1, "all-gather.N")  # one place
    assert (second.bytes, second.origin) == (4096, "argument state.params['embed']")
    assert (third.bytes, third.shape) == (3000, "f32[16]")


def test_known_models_have_their_published_numbers_of_parameters():
    counts = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(model_shape(name))))
        for name in KNOWN
    }
    assert counts == {
        "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
        "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
        "Qwen/Qwen2.5-0.5B": 494_032_768,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "google/gemma-3-270m": 268_098_176,
        "google/gemma-3-1b": 999_885_952,
        "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    }
    assert model_shape("Qwen2.5-Math-7B-Instruct") == model_shape("Qwen/Qwen2.5-Math-7B")
    assert model_shape("google/gemma-3-1b-it") == model_shape("google/gemma-3-1b")


def test_flops_follow_the_six_per_parameter_rule():
    """Without attention and head: 2 forward, 6 in training, 8 with layers computed again."""
    shape = roofline.Shape(layers=3, matmul_params_per_layer=100, attention_width=0, head_params=0)
    sizes = {"groups": 2, "k": 4, "p": 10, "t": 6}
    tokens = 2 * (10 + 4 * 5)  # the last token of a completion needs no pass of its own
    assert roofline.score_work(shape, **sizes).model == 2 * 300 * tokens
    work = roofline.train_work(shape, **sizes, remat=True, two_passes=False)
    assert (work.model, work.executed) == (6 * 300 * tokens, 8 * 300 * tokens)
    frozen = dataclasses.replace(shape, frozen=True)
    work = roofline.train_work(frozen, **sizes, remat=True, two_passes=False)
    assert (work.model, work.executed) == (4 * 300 * tokens, 6 * 300 * tokens)
    pairs = roofline.Shape(layers=1, matmul_params_per_layer=0, attention_width=8, head_params=0)
    assert roofline.score_work(pairs, **sizes).model == 4 * 8 * 2 * (10 * 10 + 4 * 5 * (10 + 5))
    apart = roofline.train_work(pairs, **sizes, remat=False, two_passes=False)
    of_frozen = dataclasses.replace(pairs, frozen=True)
    assert roofline.train_work(of_frozen, **sizes, remat=False, two_passes=False) == apart
    head = roofline.Shape(layers=0, matmul_params_per_layer=0, attention_width=0, head_params=70)
    assert roofline.score_work(head, **sizes).model == 2 * 70 * 2 * 4 * 6
    assert roofline.decode_work(head, **sizes).model == 2 * 70 * 2 * 4 * 6


def test_the_estimate_is_the_slowest_limit():
    chip = roofline.Chip(1, 10.0, 5.0, 2.0, 1.0, clock=1.0)
    limits, bound = roofline.estimate(chip, flops=30, hbm_bytes=20, ici_bytes=6, dcn_bytes=1)
    assert limits == {"compute": 3, "hbm": 4, "ici": 3, "dcn": 1}
    assert bound == "hbm"


def test_the_report_reads_well(report):
    text = as_text(report)
    assert "v5e:2x2: 4 chips, mesh data 1 x fsdp 4 x tensor 1" in text
    assert "Assumptions:" in text
    assert "all-gather over 4" in text
    assert text.count("  by the compiler's clock ") == 4


def test_saved_reports_are_of_the_configs_as_they_are(tmp_path):
    """And each fits; a recipe that changed must be compiled again, but not for a new default.

    Those with settings under older names are read as the new ones.
    """
    folder = Path(__file__).parents[2] / "experiments" / "tpu_compile"
    recipes = runpy.run_path(str(folder / "run.py"))["RECIPES"]
    for name, (config, topology, more) in recipes.items():
        settings = [item for item in more if "=" in item]
        report = json.loads((folder / "reports" / f"{name}.json").read_text())
        file = folder.parent.parent / "configs" / f"{config}.yaml"
        config = load_config(file, settings)
        sizes = {part: dataclasses.asdict(size) for part, size in batch_sizes(config).items()}
        assert report["batch"] == sizes
        if report["config"]["eval"]["success_reward"] == 1.0:  # the default then
            report["config"]["eval"]["success_reward"] = None
        (tmp_path / "then.yaml").write_text(json.dumps(report["config"]))
        assert (report["topology"], load_config(tmp_path / "then.yaml")) == (topology, config)
        assert report["fits"]
        assert f"| {name} | train step |" in (folder / "README.md").read_text()


def test_what_travels_between_slices_is_counted():
    """XLA:TPU turns it into sends and receives, one for each collective; channels are their own."""

    def over(slices, kind):
        target = f'_xla_megascale_target="{{{slices}}}x{{0:1}}"'
        return f'frontend_attributes={{{target},_xla_megascale_transfer_type="{kind}"}}'

    hlo = f"""{HLO}
ENTRY %main (x: f32[64]) -> f32[64] {{
  %a = f32[8]{{0}} all-reduce(%x), channel_id=7, replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  %s = (bf16[2,8]{{1,0}}, u32[], token[]) send(%a), channel_id=8, {over("1,2", "ALL_REDUCE")}
  %r = (bf16[2,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=7, {over("1,2", "ALL_REDUCE")}
  %r.1 = (f32[12]{{0}}, u32[], token[]) recv(%u), channel_id=9, {over("0:2", "ALL_GATHER")}
}}
"""
    found = {c.kind: c for c in collectives(hlo, devices=4) if c.between_slices}
    assert found["all-reduce"] == Collective("all-reduce", 2, True, 1, 32, 32)
    assert found["all-gather"] == Collective("all-gather", 3, True, 1, 48, 32)


def test_each_chip_sends_its_share_of_the_gradients_to_the_other_slice(tmp_path):
    """In bfloat16 or float32, and little beside it."""
    d, v, ff, kv = 256, 512, 512, 128
    shape = {"hidden_size": d, "vocab_size": v, "intermediate_size": ff}
    (tmp_path / "config.json").write_text(json.dumps(TINY | shape))
    out = tmp_path / "two.json"
    options = ["--slices", "2", "--only", "train", "--model-config", str(tmp_path / "config.json")]
    command = ["compile", "debug", "--topology", TOPOLOGY, *options, "--out", str(out)]
    assert main([*command, *OVERRIDES, "train.batch_size=8"]) == 0
    (row,) = json.loads(out.read_text())["programs"]
    moved = sum(c["wire_bytes"] for c in row["collectives"] if c["between_slices"])
    entries = (2 * v * d + 2 * d * d + 2 * d * kv + 3 * d * ff) // 4
    assert 2 * entries < moved < 1.1 * 4 * entries
    assert row["seconds"]["dcn"] > 0
