"""The loop of a run, from top to bottom: rounds of updates, evaluations, checkpoints, resuming."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.collect.collector import Collector, sampling_params
from gvpo_jax.collect.feed import Feed
from gvpo_jax.config import Config
from gvpo_jax.data.rows import EncodedPrompts
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import is_first, raise_together
from gvpo_jax.parallel.preemption import Preempted, watch
from gvpo_jax.report.html import write_report
from gvpo_jax.rundir.claim import (
    check_claim,
    check_not_lost,
    claim,
    lock,
    write_evaluation,
    write_summary,
)
from gvpo_jax.rundir.files import read_summary
from gvpo_jax.rundir.log import Counters, RunLog, crossed
from gvpo_jax.training.checkpoint import Checkpoints, sweep
from gvpo_jax.training.policy import Policy


@dataclasses.dataclass(frozen=True)
class Loop:
    """One run in `config.run.dir`, which goes on where it stopped.

    Attributes:
        config: the settings.
        policy: what is trained.
        feed: gives the batches.
        collector: evaluates on the held-out rows, if there are any.
        held_out: those rows.
        data_fingerprint: tells training rows, held-out rows and reward functions from others.
        notes: lines to show at the start.
    """

    config: Config
    policy: Policy
    feed: Feed
    collector: Collector
    held_out: EncodedPrompts | None
    data_fingerprint: str
    notes: Sequence[str]

    def run(self) -> dict[str, Any]:
        """Up to `train.steps` updates, or `train.stop_at`; returns what summary.json holds.

        Raises:
            Preempted: told to end by SIGTERM; the run is saved.
        """
        c, run_dir = self.config, Path(self.config.run.dir)
        with contextlib.ExitStack() as stack:
            told_to_end = stack.enter_context(watch())
            stack.enter_context(contextlib.closing(self.policy))
            raise_together(lambda: self._open(stack))
            stack.enter_context(contextlib.closing(self.feed))
            checkpoints = Checkpoints(run_dir / "checkpoints", keep=c.checkpoint.keep)
            stack.enter_context(checkpoints)
            counters = resume(
                checkpoints, self.policy, data_fingerprint=self.data_fingerprint, feed=self.feed
            )
            raise_together(lambda: self._claim(counters))
            with RunLog(run_dir, counters, c) as log:
                if counters.step >= c.train.steps and (summary := read_summary(run_dir)):
                    log.note(f"{run_dir} has done its {counters.step} steps already: nothing to do")
                    return summary
                for note in self._opening(counters):
                    log.note(note)
                preempted = self._updates(log, checkpoints, told_to_end)
        summary = counters.summary(self.policy.model.name)
        if is_first():
            if counters.step >= c.train.steps:
                write_summary(run_dir, summary)
            write_report(run_dir)
        if preempted:
            raise Preempted
        return summary

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Hold the folder against other runs, for all processes of this one."""
        if is_first():
            check_claim(self.config)
            sweep(stack.enter_context(lock(self.config)) / "checkpoints")

    def _claim(self, counters: Counters) -> None:
        if is_first():
            if counters.step == 0:
                check_not_lost(Path(self.config.run.dir), self.config)
            claim(self.config)

    def _updates(
        self, log: RunLog, checkpoints: Checkpoints, told_to_end: Callable[[], bool]
    ) -> bool:
        """Whether it ended early because it was told to."""
        c, counters = self.config, log.counters
        if counters.step == 0:
            counters.accuracy_before = self._evaluate(log, "before")
        while counters.step < min(c.train.steps, c.train.stop_at or c.train.steps):
            if told_to_end():
                if counters.step:
                    self._save(log, checkpoints)
                    log.note("told to end: saved, the same command goes on")
                else:
                    log.note("told to end before the first update: the same command starts over")
                return True
            last = counters.step
            self._round(log)
            if crossed(last, counters.step, c.eval.every) and counters.step < c.train.steps:
                self._evaluate(log, f"step_{counters.step:06d}")
            if crossed(last, counters.step, c.checkpoint.every):
                self._save(log, checkpoints)
        self._save(log, checkpoints)
        if counters.step >= c.train.steps and counters.accuracy_after is None:
            counters.accuracy_after = self._evaluate(log, "after")
        return False

    def _round(self, log: RunLog) -> None:
        """One rollout, or as many given groups, and the updates on them."""
        c, counters = self.config, log.counters
        if c.reference.name == "previous":
            self.policy.refresh_reference_if_due()
        batches = self.feed.round(counters.rollouts)
        counters.rollouts += 1
        for place, fed in enumerate(batches, start=1):
            if fed.records:
                log.completions(counters.step + place, fed.records)
            if math.isnan(fed.metrics["reward"]):
                step = counters.step + place
                log.note(f"step {step}: no completion has a reward, there is nothing to learn from")
        for fed in batches * c.train.num_iterations:
            if counters.step < c.train.steps:
                log.step(self.policy.update(fed.batch, fed.plan), fed.metrics)

    def _evaluate(self, log: RunLog, name: str) -> float | None:
        """Accuracy on the held-out rows, written down; None where there are none."""
        if self.held_out is None:
            return None
        metrics, records = self.collector.evaluate(self.held_out)
        if is_first():
            write_evaluation(log.run_dir, name, records)
        log.evaluation(name, metrics)
        return metrics["eval/accuracy"]

    def _save(self, log: RunLog, checkpoints: Checkpoints) -> None:
        state, samples = self.policy.checkpoint(), self.feed.state()  # waits for rounds drawn ahead
        log.flush()
        extra = {
            "counters": log.counters.as_dict(),
            "refreshed_at": self.policy.refreshed_at,
            "start_fingerprint": self.policy.start_fingerprint,
            "data_fingerprint": self.data_fingerprint,
        }
        checkpoints.save(log.counters.step, state, extra, samples)

    def _opening(self, counters: Counters) -> list[str]:
        start = f"going on from step {counters.step}" if counters.step else "starting"
        lines = [f"{start}; what runs for the first time is compiled, which takes a while"]
        if sampling_params(self.config).cuts_support:
            lines.append(
                "top_k, top_p and min_p keep some tokens from ever being sampled: GVPO's optimum "
                "is then not reached, because the samples do not cover the reference"
            )
        return [*lines, *self.notes]


def resume(
    checkpoints: Checkpoints,
    policy: Policy,
    *,
    data_fingerprint: str | None = None,
    feed: Feed | None = None,
) -> Counters:
    """Let policy and feed take over the last whole checkpoint; all at 0 where there is none.

    Raises:
        UserError: it belongs to another model, or to other `data_fingerprint` than these.
    """
    restored = checkpoints.restore(policy.checkpoint_like())
    if restored is None:
        return Counters()
    if restored.extra["start_fingerprint"] != policy.start_fingerprint:
        raise UserError(
            f"{policy.model.name} is not the model that this run started from; "
            "bring it back, or choose another run.dir"
        )
    if data_fingerprint not in (None, restored.extra["data_fingerprint"]):
        raise UserError(
            "training rows, held-out rows or reward functions are not those of this run; "
            "bring them back, or choose another run.dir"
        )
    policy.load_checkpoint(restored.state, restored.extra["refreshed_at"])
    if feed:
        feed.load(restored.samples)
    return Counters(**restored.extra["counters"])
