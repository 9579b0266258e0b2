"""What a run counts and tells: counters, metrics, samples and evaluations."""

import dataclasses
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from gvpo_jax.errors import NotFinite, UserError
from gvpo_jax.parallel.distributed import is_first
from gvpo_jax.rundir.claim import write_evaluation
from gvpo_jax.rundir.files import read_history
from gvpo_jax.rundir.formats import score_names, scores_text
from gvpo_jax.rundir.traces import Trace, traced_updates
from gvpo_jax.rundir.trackers import (
    PATIENCE,
    AboutRun,
    TrackerName,
    Trackers,
    name_of_run,
    without_secrets,
)
from gvpo_jax.rundir.writers import MetricsWriter, Progress
from gvpo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is shown and written while the run goes on."""

    trackers: list[TrackerName] = setting(
        [],
        "Where metrics go as well, any of wandb, trackio and tensorboard; each needs the extra of "
        "its name.",
        free=True,
    )
    project: str = setting("gvpo-jax", "Of wandb and trackio.", free=True)
    tensorboard: bool = setting(False, "An older name of log.trackers=[tensorboard].", free=True)
    profile: str | None = setting(
        None,
        "START:COUNT traces so many updates, from this one on, counted from 1, into profile/.",
        free=True,
    )
    completions_every: int = setting(
        10, "Updates between samples written to disk.", least=1, free=True
    )
    samples: int = setting(3, "Completions shown on screen each time.", least=0, free=True)

    def check(self) -> None:
        """That the settings make sense.

        Raises:
            UserError: a tracker is named twice, the project has no name, or the profile is not
                START:COUNT.
        """
        names = self.trackers
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise UserError(f"log.trackers names {twice[0]} twice; name it once")
        if not self.project.strip():
            raise UserError("log.project is empty: give the name that trackers put the run under")
        traced_updates(self.profile)

    def all_trackers(self) -> list[str]:
        """Those of `trackers`, with the one by an older name."""
        old = self.tensorboard and "tensorboard" not in self.trackers
        return [*self.trackers, *(["tensorboard"] if old else [])]


@dataclasses.dataclass
class Counters:
    """How far a run has come; saved in every checkpoint."""

    step: int = 0  # updates done
    rollouts: int = 0  # rollouts done, which is also the position in the data
    num_tokens: int = 0  # of prompts and completions trained on
    train_seconds: float = 0.0  # in rollouts and updates, over all sessions
    wall_seconds: float = 0.0  # the same with evaluations and all else
    # "before" and "after" -> metrics of the held-out rows
    evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    # Each tracker by which the run was followed, and the run's id there.
    trackers: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, saved: Mapping[str, Any]) -> "Counters":
        """What was saved, be it by an earlier version."""
        names = {field.name for field in dataclasses.fields(cls)}
        counters = cls(**{name: value for name, value in saved.items() if name in names})
        if saved.get("accuracy_before") is not None:
            counters.evaluations = {"before": {"eval/accuracy": saved["accuracy_before"]}}
        return counters

    def count(self, metrics: Mapping[str, float]) -> None:
        """Add up what a batch had to leave out."""
        for name, metric in _COUNTED.items():
            self.left_out[name] += int(metrics.get(metric, 0))
        if skipped := int(metrics.get("skipped_rows", 0)):  # of a stream; else known before
            self.left_out["training_rows"] = self.left_out.get("training_rows", 0) + skipped

    def summary(self, model: str) -> dict[str, Any]:
        """What summary.json holds; an evaluation that was not made is left out."""
        return self._scores() | {
            "steps": self.step,
            "num_tokens": self.num_tokens,
            "train_seconds": round(self.train_seconds, 1),
            "wall_seconds": round(self.wall_seconds, 1),
            "peak_memory_gib": round(_peak_gib(), 2),
            "model": model,
            **{f"left_out/{name}": count for name, count in self.left_out.items()},
        }

    def _scores(self) -> dict[str, float]:
        """Accuracy before and after with its intervals, or reward where one has no accuracy.

        And pass@k and maj@k, and what evaluation sets have.
        """
        evaluations = self.evaluations.values()
        names = [*score_names(evaluations), *score_names(evaluations, of_sets=True)]
        return {
            f"{name}_{when}{end}": metrics[name + end]
            for when, metrics in self.evaluations.items()
            for name in [*names, "eval/unscored"]
            for end in ("", "_low", "_high")
            if name + end in metrics
        }


# Of a run's left_out: the metrics of a batch that are added up.
_COUNTED = {
    "rewards_failed": "rewards/failed",
    "rewards_abstained": "rewards/abstained",
    "groups": "skipped_groups",
}


class RunLog:
    """Writes and shows a session's metrics, samples and evaluations; use as a context manager.

    An update's metrics are fetched when the next update has been sent off, so that the loop never
    waits for them. Of several processes the first alone writes and shows.

    Trackers are handed the same metrics, see `gvpo_jax.rundir.trackers`.

    `history` becomes what metrics.jsonl holds, a dict for each line, and grows with it. Of several
    processes only the first has the lines of earlier sessions.

    Attributes:
        trace: of the updates of `log.profile`.
        summary: as in summary.json, once the session has come to its end.
        patience: seconds that the end waits for trackers.
    """

    def __init__(
        self,
        run_dir: Path,
        counters: Counters,
        options: LogConfig,
        total_steps: int,
        per_round: int,
        history: list[dict[str, Any]],
        *,
        evaluated: bool,
        settings: Mapping[str, Any] | None = None,  # all of the run, by section, for trackers
    ):
        self.counters, self._run_dir, self._writer = counters, run_dir, None
        self._history = history
        history.clear()
        if is_first():
            last = counters.step or -1  # not 0: a fresh run keeps no evaluation of an earlier try
            self._writer = MetricsWriter(run_dir, first_step=last, evaluated=evaluated)
            history += read_history(run_dir)
        console = None if is_first() else Console(quiet=True)
        self._progress = Progress(total_steps, counters.step, per_round=per_round, console=console)
        self._every, self._samples = options.completions_every, options.samples
        self._pending: tuple[int, Mapping[str, Any], dict[str, float], bool] | None = None
        self._compiling = 0.0  # seconds since the last step
        self._session_start = self._step_start = time.perf_counter()
        self._wall_before = counters.wall_seconds
        self._told: set[str] = set()
        self._to_show: dict[int, Sequence[Mapping[str, Any]]] = {}  # samples, below their step
        self.summary: Mapping[str, Any] = {}
        self.patience = PATIENCE
        updates = traced_updates(options.profile) if is_first() else range(0)
        self.trace = Trace(run_dir / "profile", updates, self.attempt, self.note)
        self._trackers = Trackers(self._followed_by(options, settings or {}), self.note)

    def __enter__(self) -> "RunLog":
        self._progress.__enter__()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *error: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        if error[0] is None:
            self.flush()
        self.trace.close(self.counters.step)
        self._progress.__exit__(*error)
        if self._writer:
            self._writer.close()
        self._trackers.close(self.summary if error[0] is None else None, self.patience)

    def step(
        self,
        on_device: Mapping[str, jax.Array | float],
        here: Mapping[str, float],
        *,
        at_peak: float | None = None,
    ) -> None:
        """Book an update that was just sent off.

        at_peak: seconds that it would take if the chips did nothing but multiply at their peak.
        """
        self._fetch()
        now = time.perf_counter()
        seconds, self._step_start = now - self._step_start, now
        c, told = self.counters, dict(here)
        tokens = int(told.pop("tokens"))
        c.step += 1
        self.trace.end(c.step, on_device)
        c.num_tokens += tokens
        c.train_seconds += seconds
        told |= {"num_tokens": c.num_tokens, "step_time": seconds}
        told |= {f"left_out/{name}": float(count) for name, count in c.left_out.items() if count}
        told["tokens_per_second"] = tokens / seconds
        if at_peak is not None:
            told["mfu"] = at_peak / seconds
        told |= device_memory(jax.local_devices())
        compiled = self._compiling > seconds / 10
        self._pending, self._compiling = (c.step, on_device, told, compiled), 0.0

    def completions(self, step: int, records: Sequence[Mapping[str, Any]], *, last: int) -> None:
        """Every so many updates, keep what was sampled for update `step` on disk.

        Some is shown below the line of that update.

        last: the update that the completions before these were sampled for.
        """
        if crossed(last - 1, step - 1, self._every) and (writer := self._writer):
            self.attempt(lambda: writer.completions(step, records))
            stride = max(len(records) // max(self._samples, 1), 1)
            self._to_show[step] = records[::stride][: self._samples]

    def evaluation(
        self, name: str, metrics: Mapping[str, float], records: list[dict[str, Any]]
    ) -> None:
        """Book an evaluation at the current step; its time does not count as training."""
        self.flush()
        self._log(self.counters.step, metrics)
        if self._writer:  # second: where this file is, the metrics are too
            self.attempt(lambda: write_evaluation(self._run_dir, name, records))
        if name in ("before", "after"):
            self.counters.evaluations[name] = dict(metrics)
        shown = list(self.counters.evaluations.values()) if name == "after" else [metrics]
        unscored = f"{metrics['eval/unscored']:.0f} of {len(records)} completions without a reward"
        text = (
            f"{scores_text(shown)}; {unscored}" if metrics["eval/unscored"] else scores_text(shown)
        )
        self.note(f"evaluation {name}: {text}")
        self._step_start, self._compiling = time.perf_counter(), 0.0

    def note(self, text: str) -> None:
        """Show a line."""
        self._progress.note(text)

    def attempt(self, write: Callable[[], Any]) -> None:
        """Write what the training can do without: where that fails, one line says so."""
        try:
            write()
        except Exception as error:  # a report's too
            known = isinstance(error, UserError)
            text = str(error) if known else " ".join(f"{type(error).__name__}: {error}".split())
            if text not in self._told:
                self.note(f"{text}; the run does without")
            self._told.add(text)

    def flush(self) -> None:
        """Wait for the last update, and write its metrics."""
        self._fetch()
        if writer := self._writer:
            self.attempt(writer.reopen)
        self.counters.wall_seconds = self._wall_before + time.perf_counter() - self._session_start

    def _fetch(self) -> None:
        if self._pending is None:
            return
        step, on_device, here, compiled = self._pending
        self._pending = None
        metrics = as_numbers(on_device)
        self._log(step, metrics | here)
        self._progress.update(step, metrics | here, compiled=compiled)
        self._progress.samples(self._to_show.pop(step, ()))
        check_finite(metrics, f"step {step}", here.get("reward", 0))

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._history.append({"step": step, **metrics})
        if writer := self._writer:
            self.attempt(lambda: writer.log(step, metrics))
        self._trackers.log(step, metrics)

    def _followed_by(self, options: LogConfig, settings: Mapping[str, Any]) -> dict[str, AboutRun]:
        """The trackers of this process, and what they are told; a fresh run is given its ids."""
        ids, about = self.counters.trackers, {}
        for name in options.all_trackers() if is_first() else ():
            resumed = name in ids
            ids.setdefault(name, secrets.token_hex(8))
            about[name] = AboutRun(
                folder=self._run_dir.absolute(),
                name=name_of_run(settings.get("run", {}).get("dir", str(self._run_dir))),
                id=ids[name],
                resumed=resumed,
                first_step=self.counters.step or -1,
                project=options.project,
                settings=without_secrets(settings),
            )
        return about

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compiling += duration_secs


def check_finite(metrics: Mapping[str, float], what: str, reward: float = 0) -> None:
    """Raise NotFinite where an update made no sense.

    reward: the mean of its rewards.
    """
    if not (np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["loss"])):
        cure = "lower optimizer.learning_rate, or look at the rewards"
        if abs(reward) > _LARGE:
            cure = f"the mean reward is {reward:.3g}: squares of it overflow, so give smaller ones"
        raise NotFinite(
            f"{what}: the loss is {metrics['loss']:.3g} and its gradient's norm "
            f"{metrics['grad_norm']:.3g}, which is not finite; {cure}. The last checkpoint is from "
            "before"
        )


_LARGE = 1e9  # no reward is meant to be so large


def as_numbers(on_device: Mapping[str, Any]) -> dict[str, float]:
    """An update's metrics as numbers, without what says nothing.

    That is sources that gave it no completion, shares where there is one source alone, and ages of
    completions that bear no date.
    """
    metrics = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
    sources = [name.removesuffix("/share") for name in metrics if name.endswith("/share")]
    present = [source for source in sources if metrics[f"{source}/share"] > 0]
    dropped = {f"{source}/{what}" for source in sources for what in ("share", "residual")}
    if len(present) > 1:
        dropped -= {name for name in dropped if name.rpartition("/")[0] in present}
    dropped |= {f"{source}/staleness" for source in sources if source not in present}
    undated = {name for name, value in metrics.items() if name.endswith("/staleness") and value < 0}
    return {name: value for name, value in metrics.items() if name not in dropped | undated}


def device_memory(devices: Sequence[Any]) -> dict[str, float]:
    """`memory_gib` in use on the fullest of these devices, and `memory_peak_gib` so far.

    In GiB. What devices do not tell is left out; processors tell nothing.
    """
    stats = [device.memory_stats() or {} for device in devices]
    names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(found) / 2**30
        for name, key in names.items()
        if (found := [of_device[key] for of_device in stats if key in of_device])
    }


def crossed(last: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` was reached after step `last`; 0: never."""
    return bool(every) and step // every > last // every


def _peak_gib() -> float:
    """The process's peak memory; the system counts it in KiB, macOS in bytes. Windows: NaN."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
