"""The compiler's own time of a program, added up by hand on a text as XLA:TPU writes it."""

import json

import pytest

from gvpo_jax.cli import main
from gvpo_jax.tpu_compile.clock import clock_of
from gvpo_jax.tpu_compile.kernels import EFFICIENCY, kernel_seconds
from gvpo_jax.tpu_compile.roofline import CHIPS
from gvpo_jax.tpu_compile.text import as_text

V5E = CHIPS["v5e"]


def cycles(n):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'


def frame(n):
    return f'metadata={{op_name="jit(f)/dot" stack_frame_id={n}}}'


# What each line costs stands beside it; the parts are added up in the test below.
HLO = f"""HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/run.py"
2 "/x/lib/gvpo_jax/training/step.py"
3 "/x/lib/gvpo_jax/logprobs.py"
4 "/x/site-packages/optax/_src/adam.py"
5 "/x/lib/gvpo_jax/precision.py"
6 "/x/lib/gvpo_jax/ops/attention.py"

FunctionNames
1 "<module>"
2 "train_step"
3 "chunk"
4 "update"
5 "product"
6 "attend"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=2 line=20 end_line=20 column=1 end_column=2}}
3 {{file_name_id=3 function_name_id=3 line=30 end_line=30 column=1 end_column=2}}
4 {{file_name_id=4 function_name_id=4 line=40 end_line=40 column=1 end_column=2}}
5 {{file_name_id=5 function_name_id=5 line=50 end_line=50 column=1 end_column=2}}
6 {{file_name_id=6 function_name_id=6 line=60 end_line=60 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}
4 {{file_location_id=4 parent_frame_id=3}}
5 {{file_location_id=5 parent_frame_id=3}}
6 {{file_location_id=5 parent_frame_id=4}}
7 {{file_location_id=6 parent_frame_id=3}}


%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8] parameter(0)
  %b = f32[8,8] parameter(1)
  ROOT %c = f32[8,8] convolution(%a, %b), {frame(5)}
}}

%moved (a: f32[8,8]) -> f32[8,8] {{
  %a.1 = f32[8,8] parameter(0)
  ROOT %t = f32[8,8] transpose(%a.1), {frame(3)}
}}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %logits = f32[8,8] fusion(%x, %y), kind=kOutput, calls=%product, {frame(6)}, {cycles(100)}
  %sum = f32[8] fusion(%x), kind=kLoop, calls=%added, {frame(3)}, {cycles(10)}
}}

%condition (p: (s32[], f32[8,8])) -> pred[] {{
  %bound = s32[] constant(3)
}}

%added (a: f32[8,8]) -> f32[8] {{
  ROOT %r = f32[8] reduce(%a, %zero), dimensions={{1}}
}}

%cheap (p: f32[8]) -> f32[8] {{
  %copy.9 = f32[8] copy(%p), {frame(2)}, {cycles(7)}
}}

%dear (p: f32[8]) -> f32[8] {{
  %add.9 = f32[8] add(%p, %p), {frame(2)}, {cycles(40)}
}}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8] parameter(0)
  %fusion.1 = f32[8,8] fusion(%x, %x), kind=kOutput, calls=%product, {cycles(1000)}
  %copy.1 = f32[8,8] copy(%fusion.1), {frame(2)}, {cycles(200)}
  %fusion.2 = f32[8,8] fusion(%copy.1), kind=kLoop, calls=%moved, {cycles(30)}
  %copy-start.1 = (f32[8,8], f32[8,8], u32[]) copy-start(%x)
  %while.1 = (s32[], f32[8,8]) while(%t), condition=%condition, body=%body
  %cond.1 = f32[8] conditional(%i, %x, %x), branch_computations={{%cheap, %dear}}
  %soft = f32[8,8] exponential(%x), {frame(7)}, {cycles(60)}
  %adam = f32[8,8] fusion(%x), kind=kLoop, calls=%added, {frame(4)}, {cycles(500)}
}}
"""


def test_the_parts_are_what_adding_up_by_hand_gives():
    clock = clock_of(HLO, V5E)
    assert clock is not None
    by_hand = {
        "products": 1000,
        "logits": 3 * (100 + 10),
        "layout": 200 + 30,
        "rest": 40,  # the dearer branch
        "attention": 60,
        "optimizer": 500,
        "collectives": 0,
    }
    assert {name: round(s * V5E.clock) for name, s in clock.parts.items()} == by_hand
    assert clock.cycles == sum(by_hand.values())
    assert clock.seconds == pytest.approx(clock.cycles / V5E.clock)


def test_the_loop_over_micro_batches_is_no_optimizer():
    """Optax runs it, with the whole of forward and backward pass inside."""
    everything_in_it = HLO.replace("/home/me/run.py", "/x/optax/microbatching/_microbatching.py")
    assert everything_in_it != HLO
    clock, plain = clock_of(everything_in_it, V5E), clock_of(HLO, V5E)
    assert clock is not None
    assert plain is not None
    assert clock.parts == plain.parts


def test_lines_of_source_are_those_that_asked():
    """Not the wrapper that every product goes through; and of a fusion, its product's."""
    clock = clock_of(HLO, V5E)
    assert clock is not None
    in_cycles = {source: round(s * V5E.clock) for source, s in clock.sources.items()}
    assert in_cycles == {
        "training/step.py:20 train_step": 1000 + 200 + 40 + 500,
        "logprobs.py:30 chunk": 330 + 30,
        "ops/attention.py:60 attend": 60,
    }


def test_a_loop_without_a_count_takes_the_one_that_is_given():
    text = HLO.replace("constant(3)", "parameter(3)")
    clock = clock_of(text, V5E, trips=5)
    assert clock is not None
    assert round(clock.parts["logits"] * V5E.clock) == 550


SCHEDULE = f"""
ENTRY %main (x: f32[1024]) -> f32[4096] {{
  %g = (f32[1024], f32[4096]) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4]
  %work = f32[8] add(%x, %x), {cycles("WORK")}
  %d = f32[4096] all-gather-done(%g)
  %s = f32[1024] all-reduce(%x), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%added
}}
"""


@pytest.mark.parametrize("work", [1, 20, 10_000])
def test_of_collectives_what_the_schedule_does_not_hide_counts(work):
    clock = clock_of(SCHEDULE.replace("WORK", str(work)), V5E, devices=4)
    assert clock is not None
    gather = 4096 * 4 * 3 / 4 / V5E.ici_bandwidth
    reduce = 2 * 1024 * 4 * 3 / 4 / V5E.ici_bandwidth
    hidden = work / V5E.clock
    assert clock.parts["collectives"] == pytest.approx(max(gather - hidden, 0) + reduce)
    assert clock.parts["rest"] == pytest.approx(hidden)


def test_collectives_wait_for_each_other():
    """Two that begin at once take as long as both; the work hides one time of its own alone."""
    start = (
        "  %NAME = (f32[1024], f32[4096]) all-gather-start(%x), channel_id=N, "
        "replica_groups=[1,4]<=[4]\n"
    )
    ends = "  %d1 = f32[4096] all-gather-done(%g1)\n  %d2 = f32[4096] all-gather-done(%g2)\n"
    both = "".join(start.replace("NAME", f"g{n}").replace("=N", f"={n}") for n in (1, 2))
    work = f"  %work = f32[8] add(%x, %x), {cycles(30)}\n"
    clock = clock_of(
        f"ENTRY %main (x: f32[1024]) -> f32[4096] {{\n{both}{work}{ends}}}\n", V5E, devices=4
    )
    assert clock is not None
    one = 4096 * 4 * 3 / 4 / V5E.ici_bandwidth
    assert clock.seconds == pytest.approx(max(2 * one, 30 / V5E.clock))


def test_a_kernel_is_counted_by_its_products_or_by_its_bytes():
    """And its attributes, which XLA writes on lines of their own, do not hide its place."""
    layouts = "{bf16[2,9,512,64]{3,2,1,0}, bf16[2,3,256,64]{3,2,1,0}, bf16[2,3,256,64]{3,2,1,0}}"
    call = (
        "  %splash_mha_fwd_residuals.3 = bf16[2,9,512,64]{3,2,1,0} custom-call(%q, %k, %v), "
        f'custom_call_target="tpu_custom_call", operand_layout_constraints={layouts}, '
        'frontend_attributes={kernel_metadata={\n\n"xprof_metadata":"{}"\n}}, '
        "metadata={stack_frame_id=7}\n"
    )
    text = HLO.replace("  %soft =", call + "  %soft =")
    clock = clock_of(text, V5E)
    assert clock is not None
    flops = 2 * 2 * (2 * 9) * 512 * 256 * 128  # two products, heads of 64 filled up to 128
    seconds = flops / (EFFICIENCY * V5E.flops)
    assert clock.kernels == {"splash_mha_fwd_residuals": (1, pytest.approx(seconds))}
    assert clock.parts["attention"] == pytest.approx(seconds + 60 / V5E.clock)
    moved = 2 * (2 * 2 * 9 * 512 * 64 + 2 * 2 * 3 * 256 * 64)
    unknown = kernel_seconds(
        "mine", "bf16[2,9,512,64]", f"operand_layout_constraints={layouts}", V5E
    )
    assert unknown == pytest.approx(moved / V5E.hbm_bandwidth)


def test_grouped_products_are_two_flops_for_each_pair():
    layouts = "operand_layout_constraints={s32[4], bf16[512,64]{1,0}, bf16[8,64,96]{2,1,0}}"
    flops = 2 * 512 * 64 * 96
    slow = CHIPS["v5e"].__class__(**{**vars(V5E), "hbm_bandwidth": 1e30})
    found = kernel_seconds("gmm", "bf16[512,96]", layouts, slow)
    assert found == pytest.approx(flops / (EFFICIENCY * V5E.flops))
    layouts = "operand_layout_constraints={bf16[64,512]{1,0}, bf16[512,96]{1,0}}"
    assert kernel_seconds("tgmm", "bf16[8,64,96]", layouts, slow) == pytest.approx(found)


ROW = {
    "name": "train step", "compile_seconds": 2.0, "fits": True, "error": None, "bound": "hbm",
    "hbm": dict.fromkeys(
        ("arguments", "outputs", "aliased", "temporaries", "beside", "peak", "usable"), 2**30
    ),
    "flops": {"model": 1e9, "executed": 2e9}, "mfu": 0.5, "collectives": [],
    "seconds": {"estimate": 0.25, "compute": 0.25, "hbm": 0.25, "ici": 0.0, "dcn": 0.0},
}  # fmt: skip
REPORT = {
    "model": "debug", "parameters": 1, "topology": "v5e:1x1", "slices": 1, "devices": 1,
    "mesh": {"data": 1}, "assumptions": [], "advice": [], "fits": True,
}  # fmt: skip


def test_without_cycles_there_is_one_clear_line():
    assert clock_of(HLO.replace("estimated_cycles", "other"), V5E) is None
    text = as_text(REPORT | {"programs": [ROW | {"clock": None}]})
    assert text.count("this libtpu gives no cycles, so the bounds are all") == 1
    assert "0.25 s, bound by hbm" in text


def clocked(seconds):
    parts = {"products": seconds * 0.75, "layout": seconds * 0.25}
    sources = {"training/step.py:20 train_step": seconds}
    clock = {"seconds": seconds, "mfu": 0.25, "parts": parts, "sources": sources, "kernels": {}}
    return REPORT | {"programs": [ROW | {"clock": clock}]}


def test_two_reports_are_compared_line_by_line(tmp_path, capsys):
    for name, seconds in (("a", 0.5), ("b", 0.25)):
        (tmp_path / f"{name}.json").write_text(json.dumps(clocked(seconds)))
    assert main(["compile", "--diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["by", "the", "compiler's", "clock,", "ms", "500", "250", "0.50"] in rows
    assert ["layout,", "ms", "125", "62.5", "0.50"] in rows
    assert ["training/step.py:20", "train_step,", "ms", "500", "250", "0.50"] in rows


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--diff", "gone.json", "b.json"], "there is no file gone.json"),
        (["--diff", "odd.json", "odd.json"], "odd.json is no report of gvpo-jax compile --out"),
        (["debug", "--diff", "odd.json", "odd.json"], "leave out the config and --topology"),
        (["debug"], "compile needs --topology CHIP:SHAPE"),
        (["--topology", "v5e:1x1"], "compile needs a config"),
    ],
)
def test_mistakes_with_reports_are_a_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.json").write_text('{"programs": [{"name": 3}]}')
    assert main(["compile", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
