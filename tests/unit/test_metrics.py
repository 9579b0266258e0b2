"""metrics.jsonl survives crashes and resumes; the terminal shows lines that are safe and plain."""

import errno
import io
import json
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gvpo_jax.errors import NotFinite, UserError, one_line
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.rundir.formats import compact, duration, percent, points
from gvpo_jax.rundir.log import Counters, LogConfig, RunLog, check_finite
from gvpo_jax.rundir.writers import MetricsWriter, Progress


def write(run_dir, steps, *, first_step=0):
    with MetricsWriter(run_dir, first_step=first_step) as writer:
        for step in steps:
            writer.log(step, {"reward": step / 10, "num_tokens": 100 * step})


def lines_of(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def strict(text):
    """json.loads that refuses NaN and Infinity, which are not JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_each_step_is_one_line_on_disk_before_the_next(tmp_path):
    with MetricsWriter(tmp_path / "run", first_step=0) as writer:
        writer.log(1, {"reward": 0.5, "num_tokens": 7})
        assert lines_of(tmp_path / "run") == ['{"step": 1, "reward": 0.5, "num_tokens": 7}']
        writer.log(2, {"reward": np.float32(0.25), "num_tokens": np.int64(14)})
    assert strict(lines_of(tmp_path / "run")[1]) == {"step": 2, "reward": 0.25, "num_tokens": 14}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_place_of_the_metrics_is_not_followed(tmp_path, there):
    """A run folder may come from somebody else."""
    target = tmp_path / "mine.txt"
    if there:
        target.write_text("mine\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl is a symbolic link.* remove the link, or"):
        write(tmp_path / "run", [1])
    assert target.exists() == there
    assert not there or target.read_text() == "mine\n"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer.log(1, {"a": math.nan, "b": math.inf, "c": np.float32(-np.inf), "d": 1.5})
    assert strict(lines_of(tmp_path)[0]) == {"step": 1, "a": None, "b": None, "c": None, "d": 1.5}


def test_torn_last_line_is_left_out_when_read_and_dropped_when_resumed(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 3, "reward": 0.3, "note": "é'.encode()[:-1])  # cut inside a letter
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert [strict(line)["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_last_line_without_its_line_break_stays_a_line_of_its_own(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.1}')
    write(tmp_path, [2], first_step=1)
    assert [strict(line)["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(1, 7))
    write(tmp_path / "cut", range(1, 6))  # the last checkpoint was at step 3
    write(tmp_path / "cut", range(4, 7), first_step=3)
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_resume_drops_later_completions_and_keeps_earlier_ones(tmp_path):
    with MetricsWriter(tmp_path, first_step=0) as writer:
        for step in (2, 4, 6):
            writer.completions(step, [{"prompt": "q", "completion": "a", "reward": 1.0}])
    MetricsWriter(tmp_path, first_step=4).close()
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        "step_000002.jsonl",
        "step_000004.jsonl",
    ]


def test_damage_in_the_middle_is_named_not_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 "):
        read_metrics(tmp_path)


def test_lines_of_one_step_are_merged_in_step_order(tmp_path):
    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer.log(2, {"reward": 0.2})
        writer.log(1, {"reward": 0.1})
        writer.log(2, {"eval/accuracy": 0.4})
    assert read_metrics(tmp_path) == [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.2, "eval/accuracy": 0.4},
    ]


def test_no_metrics_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_completions_keep_any_text_and_any_column(tmp_path):
    text = "a\u2028b\n\x00\ud800 é"
    row = {"prompt": [{"role": "user", "content": text}], "reward": math.nan, "n": np.arange(2)}
    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer.completions(10, [row, {"set": {1}}])
    raw = (tmp_path / "completions" / "step_000010.jsonl").read_bytes().split(b"\n")
    first, second = strict(raw[0]), strict(raw[1])
    assert first == {"prompt": [{"role": "user", "content": text}], "reward": None, "n": [0, 1]}
    assert second == {"set": "{1}"}
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["step_000010.jsonl"]


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


METRICS = {
    "reward": 0.41234,
    "loss": -0.5,
    "gvpo_mse": 0.0213,
    "tokens_per_second": 812.3,
    "step_time": 20.0,
}


def test_without_a_terminal_each_step_is_one_plain_line():
    console = plain_console()
    with Progress(60, 0, console=console) as progress:
        progress.update(1, METRICS)
        progress.update(2, {**METRICS, "step_time": 30.0, "eval/accuracy": 0.418})
    assert console.file.getvalue().splitlines() == [  # 59 x 20 s and 58 x 25 s are left
        "step  1/60  reward 0.412  gvpo_mse 0.021  812 tokens/s  20 s/step  20 min left",
        "step  2/60  reward 0.412  gvpo_mse 0.021  812 tokens/s  30 s/step  held-out 41.8%"
        "  24 min left",
    ]


def test_small_and_broken_numbers_stay_readable():
    console = plain_console()
    with Progress(2, 0, console=console) as progress:
        progress.update(1, {"reward": 0.0, "loss": -2.5e-5})
        progress.update(2, {"reward": math.nan, "loss": math.inf})
    lines = console.file.getvalue().splitlines()
    assert lines == ["step 1/2  reward 0.000  loss -2.5e-05", "step 2/2  reward nan  loss inf"]


def test_samples_are_one_line_each_and_cannot_steer_the_terminal():
    console = plain_console()
    rows = [
        {"prompt": "What is 1 + 1?", "completion": "[red]2[/red]\n:smile:\x1b[2J", "reward": 1.0},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "", "reward": None},
    ]
    with Progress(2, 0, console=console) as progress:
        progress.samples(rows)
        progress.note("saved\nstep 2")
    assert console.file.getvalue().splitlines() == [
        "  1.00  …What is 1 + 1? → [red]2[/red]⏎:smile:\\x1b[2J",
        "  none  …hi → ",
        "saved⏎step 2",
    ]


def test_on_a_terminal_there_is_a_bar_that_starts_where_the_run_resumes():
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with Progress(60, 20, console=console) as progress:
        progress.update(21, METRICS)
        progress.note("saved [step 21]")
    shown = console.file.getvalue()
    assert "step 20/60" in shown
    assert "step 21/60" in shown
    assert "reward 0.412" in shown
    assert "saved [step 21]" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02134, "0.0213"),
        (0.0, "0"),
        (812.3, "812"),
        (1234.0, "1234"),
        (12345.0, "12.3k"),
        (999_960.0, "1M"),
        (4.56e6, "4.56M"),
        (1e-5, "1.0e-05"),
        (math.nan, "n/a"),
    ],
)
def test_compact(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.84 s"),
        (21.84, "21.8 s"),
        (99.4, "99.4 s"),
        (99.6, "2 min"),
        (3600, "60 min"),
        (11_100, "3 h 05 min"),
        (187_200, "2 d 4 h"),
        (math.inf, "n/a"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_shares():
    assert percent(0.4184) == "41.8%"
    assert points(0.184) == "+18.4"
    assert points(-0.021) == "\u22122.1"


def test_time_left_counts_the_rollout_that_several_updates_share(tmp_path):
    """A rollout of 30 s in the first of three updates of 3 s each: 12 s an update, not 3."""
    out = io.StringIO()
    with Progress(61, 0, per_round=3, console=Console(file=out, width=200)) as progress:
        for step in range(1, 7):
            seconds = 30.0 if step % 3 == 1 else 3.0
            progress.update(step, {"reward": 0.5, "step_time": seconds})
    assert "12 s/step  11 min left" in out.getvalue().splitlines()[-1]  # 55 updates of 12 s


FULL = {"reward": 0.412, "gvpo_mse": 0.0213, "tokens_per_second": 81234.0, "eval/accuracy": 0.418}


def shown(width, **steps):
    """The last state of the bar, without control sequences, on a terminal of so many columns."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width)
    with Progress(12000, 0, console=console) as progress:
        progress.update(9999, FULL | {"step_time": 12.34})
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    return [line for line in lines if "9999/12000" in line][-1].rstrip()


def test_a_narrow_terminal_is_told_less_but_no_number_is_cut():
    line = shown(60)
    assert len(line) <= 60
    assert "…" not in line
    assert line.endswith("step 9999/12000 reward 0.412  12.3 s/step  6 h 52 min left")
    wide = shown(200)
    everything = (
        "reward 0.412  gvpo_mse 0.021  81.2k tokens/s  12.3 s/step  held-out 41.8%  6 h 52 min"
    )
    assert everything in wide
    assert "━" in wide


@pytest.mark.parametrize("width", range(40, 220, 7))
def test_at_any_width_every_number_is_whole(width):
    line = shown(width)
    assert len(line) <= width
    assert "…" not in line
    assert "9999/12000 " in line
    assert "reward 0.412" in line


def test_time_left_is_unknown_until_a_step_did_not_compile():
    console = plain_console()
    with Progress(60, 0, console=console) as progress:
        progress.update(1, {"reward": 0.5, "step_time": 300.0}, compiled=True)
        progress.update(2, {"reward": 0.5, "step_time": 2.0})
        progress.update(3, {"reward": 0.5, "step_time": 100.0}, compiled=True)
    assert console.file.getvalue().splitlines() == [
        "step  1/60  reward 0.500  5 min/step, compiled  ? left",
        "step  2/60  reward 0.500  2 s/step  2 min left",  # 58 x 2 s
        "step  3/60  reward 0.500  2 min/step, compiled  2 min left",  # 57 x 2 s
    ]


def test_a_round_in_which_a_step_compiled_tells_nothing_of_the_next():
    console = plain_console()
    with Progress(10, 0, per_round=2, console=console) as progress:
        for step, (seconds, compiled) in enumerate([(9, True), (1, False), (3, False), (1, False)]):
            progress.update(step + 1, {"step_time": float(seconds)}, compiled=compiled)
    lines = console.file.getvalue().splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == [
        "? left",
        "? left",
        "? left",
        "12 s left",
    ]


def test_samples_keep_to_the_terminals_width():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with Progress(2, 0, console=console) as progress:
        progress.samples([{"prompt": "p" * 99, "completion": "c" * 99, "reward": 0.25}])
    line = f"  0.25  …{'p' * 15} → {'c' * 31}"
    assert len(line) <= 60
    assert f"{line}\n" in console.file.getvalue()


def test_steps_that_compile_are_noticed(tmp_path, capsys):
    log = RunLog(tmp_path, Counters(), LogConfig(), 3, 1, [], evaluated=False)
    on_device = {"loss": 1.0, "grad_norm": 1.0}
    with log:
        jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 5)))
        log.step(on_device, {"tokens": 1})
        time.sleep(0.2)
        log.step(on_device, {"tokens": 1})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("/step, compiled  ? left")
    assert "compiled" not in second
    assert re.search(r"0\.2\d* s/step  0\.2\d* s left$", second)


def test_messages_are_one_line_that_steers_no_terminal():
    assert one_line("a\x1b[31m b\nc") == "a\\x1b[31m b⏎c"
    long = one_line("start" + "x" * 20_000 + "end")
    assert len(long) <= 500
    assert long.startswith("startxx")
    assert long.endswith("xxend")
    assert "xx...xx" in long


def test_a_loss_that_overflows_names_its_cause():
    finite = {"loss": 1.0, "grad_norm": 1.0}
    check_finite(finite, "step 1", 1e30)
    with pytest.raises(NotFinite, match=r"step 1: .*the mean reward is 1e\+30: squares of it over"):
        check_finite(finite | {"loss": math.inf}, "step 1", 1e30)
    with pytest.raises(NotFinite, match=r"lower optimizer\.learning_rate"):
        check_finite(finite | {"grad_norm": math.nan}, "step 1", 0.5)


def test_samples_are_shown_below_the_line_of_their_step(tmp_path, capsys):
    log = RunLog(tmp_path, Counters(), LogConfig(samples=1), 12, 1, [], evaluated=False)
    with log:
        for step in range(1, 12):
            record = {"prompt": "q", "completion": f"answer {step}", "reward": 1.0}
            log.completions(step, [record], last=step - 1)
            log.step({"loss": 1.0, "grad_norm": 1.0}, {"tokens": 1})
    out = capsys.readouterr().out.splitlines()
    shown = {place: line for place, line in enumerate(out) if "answer" in line}
    assert [line.split()[-1] for line in shown.values()] == ["1", "11"]
    assert [out[place - 1].split()[1] for place in shown] == ["1/12", "11/12"]


def test_metrics_that_found_no_space_are_written_when_there_is_some(tmp_path):
    class FullAfterFiveBytes:
        def __init__(self, file):
            self.file, self.full = file, True

        def write(self, data):
            if self.full and not data.startswith(b'{"ste'):
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:5] if self.full else data)

        closed = False

        def close(self):
            self.file.close()

    with MetricsWriter(tmp_path, first_step=0) as writer:
        writer._file = disk = FullAfterFiveBytes(writer._file)
        with pytest.raises(UserError, match=r"can't write .*metrics\.jsonl: No space left"):
            writer.log(1, {"reward": 0.5})
        assert lines_of(tmp_path) == ['{"ste']
        disk.full = False
        writer.log(2, {"reward": 1.0})
    rows = [strict(line) for line in lines_of(tmp_path)]
    assert rows == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}]


def test_metrics_reopened_go_on_where_they_were(tmp_path, monkeypatch):
    """Also where the folder can't be reached for a while, and after a change of directory."""
    monkeypatch.chdir(tmp_path)
    with MetricsWriter("run", first_step=0) as writer:
        monkeypatch.chdir("/")
        writer.log(1, {"reward": 0.5})
        writer.reopen()
        writer.log(2, {"reward": 0.5})
        (tmp_path / "run").rename(tmp_path / "away")
        with pytest.raises(UserError, match=r"can't write .*metrics\.jsonl: No such file"):
            writer.reopen()
        with pytest.raises(UserError, match="No such file"):
            writer.log(3, {"reward": 0.5})
        (tmp_path / "away").rename(tmp_path / "run")
        writer.log(4, {"reward": 0.5})
    assert [strict(line)["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_an_evaluation_that_a_longer_run_has_not_is_dropped(tmp_path):
    with MetricsWriter(tmp_path, first_step=-1) as writer:
        for step, name in ((1, "reward"), (1, "eval/reward"), (2, "reward"), (2, "eval/reward")):
            writer.log(step, {name: 0.5})
    kept = [(1, "reward"), (1, "eval/reward"), (2, "reward")]
    for name in ("eval/after.jsonl", "eval/step_000001.jsonl", "eval/step_000002.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    MetricsWriter(tmp_path, first_step=2, evaluated=False).close()
    assert [tuple(strict(line))[1:] for line in lines_of(tmp_path)] == [(n,) for _, n in kept]
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["step_000001.jsonl"]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_the_screen_can_not_show_is_replaced(terminal):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    console = Console(file=screen, force_terminal=terminal, width=200)
    with Progress(2, 0, console=console) as progress:
        progress.samples([{"prompt": "caf\u00e9 \u0437", "completion": "\ud83d", "reward": 1.0}])
        progress.update(1, METRICS)
    screen.flush()
    shown = screen.buffer.getvalue().decode("latin-1")
    assert "  1.00  ?caf\u00e9 ? ? ?" in shown
    assert "reward 0.412" in shown


def test_rewards_that_failed_are_counted_on_the_line_of_their_step():
    console = plain_console()
    with Progress(1, 0, console=console) as progress:
        progress.update(1, {"reward": 0.5, "rewards/failed": 2.0, "rewards/abstained": 0.0})
    assert console.file.getvalue().splitlines() == ["step 1/1  reward 0.500  2 rewards failed"]


def test_a_log_on_a_full_disk_does_not_end_the_training():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    Progress(1, 0, console=Console(file=Full())).update(1, {"reward": 0.5})
