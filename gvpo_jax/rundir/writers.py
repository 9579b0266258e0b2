"""What a run tells while it runs: metrics.jsonl, completions and the terminal."""

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from gvpo_jax.errors import UserError, visible
from gvpo_jax.rundir.claim import usable
from gvpo_jax.rundir.files import METRICS, read_jsonl, step_files, to_json, write_jsonl, write_text
from gvpo_jax.rundir.formats import compact, duration, percent

_BAR, _WIDE = 20, 120  # columns of the bar, and of a terminal that has room for one
_BESIDE = 8  # columns of the spinner, the word "step" and spaces


class MetricsWriter(contextlib.AbstractContextManager):
    """Writes metrics.jsonl and completions/ of one run folder.

    What an interrupted run wrote after its last checkpoint is dropped on start, and so is the end
    of a run that is made longer: the files are those of a run that did it all in one go.

    Args:
        run_dir: the folder.
        first_step: the last step whose result is kept; -1 keeps nothing.
        evaluated: whether the evaluation at that step is kept too.

    Raises:
        UserError: the folder can't be used.
    """

    def __init__(self, run_dir: Path | str, *, first_step: int, evaluated: bool = True):
        self._run_dir = Path(run_dir).absolute()  # a reward function may change the directory
        self._unwritten = b""
        self._metrics = self._run_dir / METRICS
        # In a folder from elsewhere it may lead to any file, also to one that is not there yet.
        if self._metrics.is_symlink() and not self._metrics.is_char_device():
            raise UserError(
                f"{self._metrics} is a symbolic link, and a run would write to where it leads; "
                "remove the link, or take another run.dir"
            )
        with usable(self._run_dir):
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _keep_steps_until(self._metrics, first_step, evaluated)
            _drop_files_after(self._run_dir, first_step, evaluated)
            self._file = self._metrics.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line; a crash of this process after the return can't lose it.

        Raises:
            UserError: it can't be written; the next call tries again to write it first.
        """
        line = to_json({"step": step, **metrics}) + "\n"
        self._unwritten += line.encode(errors="backslashreplace")
        if self._file.closed:
            self.reopen()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"can't write {self._metrics}: {reason}") from None

    def reopen(self) -> None:
        """Close metrics.jsonl and open it again: in a mounted bucket it shows up only then.

        Raises:
            UserError: that can't be done.
        """
        try:
            self._file.close()
            self._file = self._metrics.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"can't write {self._metrics}: {error.strerror or error}") from None

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write completions/step_000010.jsonl, whole or not at all."""
        write_jsonl(self._run_dir / "completions" / f"step_{step:06d}.jsonl", rows)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more, say after Ctrl-C on `| tee`: a run goes on, and is saved."""
        self.quiet = True


class Progress:
    """A run on the terminal: a live bar where there is one, else one plain line per step.

    first_step: steps already done (0 for a new run). per_round: updates on each rollout, whose time
    is counted in the first of them. console: where to print, by default standard output.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        *,
        per_round: int = 1,
        console: Console | None = None,
    ):
        self._total, self._per_round = total_steps, per_round
        self._console = console or _Screen()
        self._round: list[float] = []
        self._round_compiled = False
        self._step_times: deque[float] = deque(maxlen=20)  # means of rounds in which none compiled
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            self._bar, self._task = _live_bar(self._console, total_steps, first_step)

    def update(self, step: int, metrics: Mapping[str, Any], *, compiled: bool = False) -> None:
        """Show a finished step: reward, gvpo_mse (or loss), tokens/s, step time and time left.

        compiled: whether compiling took part of its time, which then tells nothing of the others'.
        """
        if "step_time" in metrics:
            self._round.append(float(metrics["step_time"]))
            self._round_compiled |= compiled
        latest = fmean(self._round or [0])
        if len(self._round) == self._per_round:
            if not self._round_compiled:
                self._step_times.append(latest)
            self._round, self._round_compiled = [], False
        if self._step_times and not compiled:
            latest = self._step_times[-1]
        left = (self._total - step) * median(self._step_times) if self._step_times else None
        parts = _status(metrics, latest, compiled, left, last=step >= self._total)
        if self._bar is None:
            width = len(str(self._total))
            self._print("  ".join([f"step {step:{width}d}/{self._total}", *parts.values()]))
        else:
            room = self._console.width - _BESIDE - len(f"{step}/{self._total}")
            room -= _BAR + 1 if self._console.width >= _WIDE else 0
            self._bar.update(self._task, completed=step, status=_fitting(parts, room))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print one line for each row: its reward, the prompt's end and the completion's start."""
        for row in rows:
            reward = row.get("reward")
            shown = "none" if reward is None else f"{float(reward):4.2f}"
            prompt, completion = _text(row.get("prompt")), _text(row.get("completion"))
            room = self._console.width - 14 if self._console.is_terminal else 120
            before, after = max(min(40, room // 3), 1), max(min(80, room - room // 3), 1)
            self._print(f"  {shown}  …{prompt[-before:]} → {completion[:after]}")

    def note(self, text: str) -> None:
        """Print one line of text above the bar."""
        self._print(visible(text))

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        # What the screen can't show, such as half an emoji, becomes a question mark.
        encoding = self._console.encoding
        line = line.encode(encoding, errors="replace").decode(encoding)
        # A log on a full disk, or output that a reward has closed, must not end the training.
        with contextlib.suppress(OSError, ValueError):
            # No markup or wrapping: a model's text may hold brackets, and logs are read by line.
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
            self._console.file.flush()


def _keep_steps_until(path: Path, last_step: int, evaluated: bool) -> None:
    end = last_step if evaluated else last_step - 1  # of evaluations
    kept = ""
    for row in read_jsonl(path):
        of_evaluation = any(name.startswith("eval/") for name in row)
        if row.get("step", 0) <= (end if of_evaluation else last_step):
            kept += to_json(row) + "\n"
    if path.is_file() and path.read_bytes() != kept.encode(errors="backslashreplace"):
        write_text(path, kept)


def _drop_files_after(run_dir: Path, last_step: int, evaluated: bool) -> None:
    """Files of later steps, and those that only a run at its end has."""
    for file in (run_dir / "eval" / "after.jsonl", run_dir / "summary.json"):
        if file.is_file():
            file.unlink()
    ends = {"completions": last_step, "eval": last_step if evaluated else last_step - 1}
    for folder, end in ends.items():
        for step, file in step_files(run_dir / folder).items():
            if step > end:
                file.unlink()


def _live_bar(console: Console, total: int, first_step: int) -> tuple[RichProgress, TaskID]:
    columns = [
        SpinnerColumn("line" if console.options.ascii_only else "dots"),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=_BAR),
        TextColumn(
            "{task.fields[status]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
    ]
    if console.width < _WIDE:
        del columns[2]
    bar = RichProgress(*columns, console=console, refresh_per_second=4)
    waiting = "the first step compiles the programs"
    return bar, bar.add_task("", total=total, completed=first_step, status=waiting)


def _status(
    metrics: Mapping[str, Any],
    per_step: float,
    compiled: bool,
    seconds_left: float | None,
    *,
    last: bool,
) -> dict[str, str]:
    """What there is to tell of a step, in the order shown."""
    parts = {}
    for name in ("reward", "gvpo_mse" if "gvpo_mse" in metrics else "loss"):
        if name in metrics:
            parts[name] = f"{name} {_fixed(float(metrics[name]))}"
    if "tokens_per_second" in metrics:
        parts["speed"] = f"{compact(float(metrics['tokens_per_second']))} tokens/s"
    if per_step:
        parts["time"] = f"{duration(per_step)}/step{', compiled' if compiled else ''}"
    if "eval/accuracy" in metrics:
        parts["held-out"] = f"held-out {percent(float(metrics['eval/accuracy']))}"
    for what in ("failed", "abstained"):
        if count := metrics.get(f"rewards/{what}"):
            parts[what] = f"{count:.0f} rewards {what}"
    if "step_time" in metrics and not last:
        parts["left"] = f"{'?' if seconds_left is None else duration(seconds_left)} left"
    return parts


def _fitting(parts: Mapping[str, str], room: int) -> str:
    """A line without the parts that do not fit, of which those that matter least go first."""
    kept = dict(parts)
    for name in ("speed", "held-out", "gvpo_mse", "loss", "time", "left"):
        if len("  ".join(kept.values())) > room:
            kept.pop(name, None)
    return "  ".join(kept.values())


def _fixed(value: float) -> str:
    """Three decimals, so that columns of a log line up, unless the number would be lost in them."""
    return f"{value:.2g}" if 0 < abs(value) < 0.00995 else f"{value:.3f}"


def _text(value: Any) -> str:
    """A prompt or completion, plain or a list of chat messages, on one line."""
    if isinstance(value, list):
        value = " ".join(str(part.get("content", "")) for part in value if isinstance(part, dict))
    return visible(str(value if value is not None else ""))
