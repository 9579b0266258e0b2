"""Trackers that a run's metrics go to as well: W&B, trackio and TensorBoard.

Each is called in a thread of its own, behind a queue: a slow one, one that fails and one that hangs
hold up no update.
"""

import contextlib
import inspect
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from gvpo_jax.buckets import is_address
from gvpo_jax.errors import UserError
from gvpo_jax.installed import EXTRAS, is_installed

TrackerName = Literal["wandb", "trackio", "tensorboard"]
# Each is imported from a package, which the extra of the tracker's name brings along.
PACKAGES = {name: EXTRAS[name][0] for name in get_args(TrackerName)}
WAITING = 1000  # lines of metrics that wait for a tracker at most
PATIENCE, HURRY = 30.0, 5.0  # seconds that an end waits for all trackers; one told by a signal
_FINISH = 20.0  # seconds that W&B takes to send what is left


class Tracker(Protocol):
    """What a run tells; called from one thread, which also made it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an update, or of an evaluation behind it.

        step: updates done; one that was told before may come again, after a resume.
        """
        ...

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Send what is left, and end.

        summary: as in summary.json; None: the session failed.
        """
        ...


@dataclass(frozen=True)
class AboutRun:
    """What a tracker is told of a run when it is opened.

    Attributes:
        folder: of the run, absolute.
        name: that folder's name.
        id: tells the run from all others, also of that name; the same after a resume.
        resumed: whether the tracker has followed the run before.
        first_step: updates done; -1: none.
        project: see `LogConfig`.
        settings: all of them, by section, without secrets.
    """

    folder: Path
    name: str
    id: str
    resumed: bool
    first_step: int
    project: str
    settings: Mapping[str, Any]


class WandbTracker:
    """Weights & Biases.

    Its own steps only grow, and it drops lines of earlier ones. So `step` is a metric here, and the
    x-axis of all others: what a resumed run does again stands there twice, and nothing is lost.

    Raises:
        UserError: there is no API key. W&B would ask for it on the terminal.
    """

    def __init__(self, about: AboutRun):
        import wandb  # pyright: ignore[reportMissingImports]

        _check_login(wandb)
        options: dict[str, Any] = {"console": "off"}  # the screen is the run's
        if "finish_timeout" in wandb.Settings.model_fields:  # else the end of Python waits for it
            options["finish_timeout"] = _FINISH
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=about.id,
            resume="allow",
            reinit="create_new",  # a run of the user's own goes on
            dir=os.environ.get("WANDB_DIR", str(about.folder)),
            config=dict(about.settings),
            allow_val_change=True,
            settings=wandb.Settings(**options),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **metrics})

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """See `Tracker`."""
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


class TrackioTracker:
    """trackio, which finds a run again by its project and name."""

    def __init__(self, about: AboutRun):
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            about.project,
            name=about.name,
            config=dict(about.settings),
            resume="allow" if about.resumed else "never",
            embed=False,  # no page inside a notebook's cell
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """See `Tracker`."""
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard, files in tensorboard/. Of steps that are done again it shows the last try."""

    def __init__(self, about: AboutRun):
        from tensorboardX import SummaryWriter

        first = about.first_step
        self._writer = SummaryWriter(
            str(about.folder / "tensorboard"),
            purge_step=first + 1,
            filename_suffix=f".from_{first}",  # else two starts in one second would share a file
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """See `Tracker`."""
        self._writer.close()


_OPEN: dict[str, Callable[[AboutRun], Tracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorBoardTracker,
}


class Trackers:
    """All trackers of a run. Nothing here waits for one but `close`, and nothing raises.

    A tracker that fails is told of once, and so is one that falls behind by `WAITING` lines, of
    which the newest are then left out.

    Args:
        opened: their names, and what each is told.
        tell: shows a line.
    """

    def __init__(self, opened: Mapping[str, AboutRun], tell: Callable[[str], None]):
        self._tell = tell
        self._all = [_InBackground(name, about, tell) for name, about in opened.items()]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics of an update or evaluation on."""
        for tracker in self._all:
            tracker.log(step, dict(metrics))

    def close(self, summary: Mapping[str, Any] | None, patience: float = PATIENCE) -> None:
        """Let them end, for so many seconds in all; `summary` as for `Tracker`."""
        end = time.monotonic() + patience
        for tracker in self._all:
            tracker.end(summary)
        for tracker in self._all:
            if not tracker.is_done(end):
                self._tell(f"{tracker.name} was not done after {patience:g} s; the run ends so")


class _InBackground:
    """One tracker, in a thread that Python does not wait for when it ends."""

    def __init__(self, name: str, about: AboutRun, tell: Callable[[str], None]):
        self.name, self._about, self._tell = name, about, tell
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self._summary: Mapping[str, Any] | None = None
        self._fell_behind = self._failed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{name}")
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._queue.put_nowait((step, metrics))
        except queue.Full:
            if not self._fell_behind:
                self._tell(
                    f"{self.name} is behind by {WAITING} lines of metrics: from step {step} on "
                    "it misses some"
                )
            self._fell_behind = True

    def end(self, summary: Mapping[str, Any] | None) -> None:
        self._summary = summary
        if self._queue.full():  # of what it is behind by, one line makes room
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
        self._queue.put_nowait(None)

    def is_done(self, end: float) -> bool:
        """Whether it is by then, a time of `time.monotonic`."""
        self._thread.join(max(end - time.monotonic(), 0))
        return not self._thread.is_alive()

    def _work(self) -> None:
        tracker = self._attempt(lambda: _OPEN[self.name](self._about))
        while line := self._queue.get():
            if tracker is not None:
                self._attempt(lambda line=line: tracker.log(*line))
        if tracker is not None:
            self._attempt(lambda: tracker.close(self._summary))

    def _attempt(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:
            known = isinstance(error, UserError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            if not self._failed:
                self._tell(f"{self.name}: {' '.join(text.split())}; the run does without")
            self._failed = True


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError where packages of these trackers are missing; it names the extras."""
    missing = {name: PACKAGES[name] for name in names if not is_installed(PACKAGES[name])}
    if missing:
        raise UserError(
            f"log.trackers needs what is not installed ({', '.join(missing.values())}): "
            f'pip install "gvpo-jax[{",".join(missing)}]", or leave {" and ".join(missing)} out'
        )


def name_of_run(run_dir: str) -> str:
    """What a tracker calls the run of this folder, or of this address of a bucket."""
    path = run_dir if is_address(run_dir) else Path(run_dir).resolve().as_posix()
    *_, above, name = ["", "", *path.rstrip("/").split("/")]
    return f"{above}-{name}" if name == "sft" and above else name or "run"  # a warm start's


def without_secrets(value: Any) -> Any:
    """Nested settings; addresses in their texts without what may be a name, password or key."""
    if isinstance(value, Mapping):
        return {name: without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(\w://)[^/\s?#]*@", r"\1***@", value)
    return re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1?***", value)


def _check_login(wandb: Any) -> None:
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    silent = "prompt" in inspect.signature(wandb.login).parameters
    if not (wandb.login(prompt=False) if silent else wandb.api.api_key):
        raise UserError(
            "there is no API key: run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )
