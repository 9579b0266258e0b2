"""The loop of a run, from top to bottom: rounds of updates, evaluations, checkpoints, resuming."""

import contextlib
import dataclasses
import json
import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gvpo_jax.callbacks import Callbacks
from gvpo_jax.collect.collector import Judge
from gvpo_jax.collect.early_signs import FIRST, early_signs
from gvpo_jax.collect.evaluate import evaluate
from gvpo_jax.collect.feed import Feed, TrainBatch, pack_round, unpack_round
from gvpo_jax.config import Config
from gvpo_jax.config_file import check_claim, claim
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.errors import NotFinite, Page, UserError
from gvpo_jax.parallel.distributed import from_first_host, is_first, raise_together
from gvpo_jax.parallel.preemption import (
    Abandoned,
    Interrupted,
    Preempted,
    nothing_to_save,
    watch,
)
from gvpo_jax.report import write_report
from gvpo_jax.rewards.call import RewardError
from gvpo_jax.rewards.functions import changed_code
from gvpo_jax.rollout import Engine
from gvpo_jax.rundir.bucket import push
from gvpo_jax.rundir.claim import check_not_lost, clear, lock, usable
from gvpo_jax.rundir.files import METRICS, read_history, read_summary, sweep_temporary, write_text
from gvpo_jax.rundir.formats import left_out_text
from gvpo_jax.rundir.log import Counters, RunLog, crossed
from gvpo_jax.rundir.trackers import HURRY, PATIENCE
from gvpo_jax.rundir.writers import Progress
from gvpo_jax.tpu_compile.roofline import Peak
from gvpo_jax.training.checkpoint import Checkpoints, sweep
from gvpo_jax.training.policy import Policy

_ELSE = "choose another run.dir, or start over with run.overwrite=true"


@dataclasses.dataclass
class Loop:
    """One run in `config.run.dir`, which goes on where it stopped."""

    config: Config
    model_name: str  # for the summary
    policy: Policy  # is trained
    engine: Engine  # samples the answers to held-out rows
    feed: Feed  # gives the batches
    judge: Judge  # gives those answers their rewards
    held_out: EncodedPrompts | None  # those rows, if there are any
    data_fingerprint: str  # tells training rows, held-out rows and reward functions from others
    reward_code: Mapping[str, str]  # and by their names, those functions' code
    left_out: Mapping[str, int]  # rows that are not used, and why
    data_signs: Sequence[str]  # what else there is to tell about the rows
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # see `RunLog`
    callbacks: Callbacks = dataclasses.field(default_factory=lambda: Callbacks(()))
    checker: Judge | None = None  # says which of those answers are right; None: their rewards do
    peak: Peak | None = None  # what this process's chips can do, if they are known
    round: list[TrainBatch] | None = None  # the round under way; None: the next has not begun
    done: int = 0  # updates of it that are done
    early: list[TrainBatch] | None = None  # the run's first ones, until they are looked at
    replaces: bool = False  # another run, which was in the folder
    score: tuple[int, float] = (0, math.nan)  # the last step with held-out answers, and theirs
    still_held: Callable[[], None] = lambda: None  # raises where another process has the folder
    lost: int = 0  # updates of an earlier start that had no checkpoint
    folder: Path = Path()  # absolute: a reward function may change the directory
    # Is closed by this session's first update: until then a signal may end the process.
    starting: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def run(self) -> dict[str, Any]:
        """Up to `train.steps` updates, or `train.stop_at`; returns what summary.json holds.

        Raises:
            Preempted: told to end by SIGTERM; the run is saved.
            Interrupted: told to end by Ctrl-C; the run is saved.
            UserError: the folder belongs to another run, or what sampling and updates raise.
        """
        c, self.folder = self.config, self.config.run.folder.absolute()
        total = c.train.updates
        with contextlib.ExitStack() as stack:
            told_to_end = stack.enter_context(watch())
            checkpoints, counters = self._take_up(stack)
            summary = from_first_host(lambda: read_summary(self.folder))
            if counters.step >= total and summary.get("steps") == counters.step:
                self._say_it_is_done()
                return summary
            log = self._open_log(stack, checkpoints, counters)
            save = partial(self._save, log, checkpoints)
            end = min(total, c.train.stop_at or total)
            with contextlib.suppress(Abandoned):
                while counters.step < end and not (told_to_end() or self.callbacks.ending):
                    last = counters.step - self.done
                    self._round(log, told_to_end, save)
                    if self.round:
                        continue  # told to end, or done, before the round's last update
                    if self._evaluation_is_due(counters.step):
                        with _kept(save, counters):
                            self._evaluate(log, _at(counters.step))
                    if crossed(last, counters.step, c.checkpoint.every):
                        save()  # with the score, if there is one
            if counters.step:
                save()
                checkpoints.wait()  # nothing that fails below costs what was trained
            told = told_to_end()
            try:
                summary = self._end(log, told)
            except Abandoned:
                summary = self._end(log, told := told_to_end())
        if told == signal.SIGINT:
            raise Interrupted(_why_it_ended(told, counters.step, c.run.overwrite))
        if told:
            raise Preempted
        return summary

    def _take_up(self, stack: contextlib.ExitStack) -> tuple[Checkpoints, Counters]:
        """Hold the folder, and go on from its last checkpoint, if there is one."""
        self.starting.enter_context(nothing_to_save())
        stack.enter_context(self.starting)
        stack.enter_context(contextlib.closing(self.engine))
        from_first_host(lambda: self._open(stack))
        stack.enter_context(contextlib.closing(self.feed))
        c = self.config
        checkpoints = Checkpoints(
            c.run.checkpoints, keep=c.checkpoint.keep, keep_best=c.checkpoint.keep_best
        )
        stack.enter_context(checkpoints)
        counters = self._resume(checkpoints)
        from_first_host(lambda: self._claim(counters))
        return checkpoints, counters

    def _open_log(
        self, stack: contextlib.ExitStack, checkpoints: Checkpoints, counters: Counters
    ) -> RunLog:
        """The session's log, after what comes before its first update."""
        c, step = self.config, counters.step
        evaluated = from_first_host(lambda: self._is_evaluated(step))
        options = c.log, c.train.updates, self._per_round, self.history
        more = {"evaluated": evaluated, "settings": dataclasses.asdict(c)}
        log = raise_together(lambda: RunLog(self.folder, counters, *options, **more))
        stack.enter_context(log)
        stack.enter_context(_saying_what_is_left(log, checkpoints, c.run.overwrite))
        for note in self._opening(counters):
            log.note(note)
        if step == 0:
            self.early = []
            self._evaluate(log, "before")
        elif self._evaluation_is_due(step) and not evaluated:
            self._evaluate(log, _at(step))
        return log

    def _say_it_is_done(self) -> None:
        if is_first():
            run, steps = self.config.run, self.config.train.updates
            note = f"{run.dir} has done its {steps} steps already: nothing to do"
            Progress(steps, steps).note(note)
            self.history[:] = read_history(self.folder)
            if not (self.folder / "report.html").exists():  # killed just before it was drawn
                with contextlib.suppress(UserError):
                    write_report(self.folder)
                    push(run.dir)

    def _end(self, log: RunLog, told: int) -> dict[str, Any]:
        """Evaluate a run that is done, write its summary, and a report; returns the summary.

        told: the signal that ends the session, or 0.
        """
        c, step, run_dir = self.config, log.counters.step, self.folder
        total = c.train.updates
        if told:
            log.note(_why_it_ended(told, step, c.run.overwrite))
        elif step >= total:
            self._evaluate(log, "after")
        elif self.callbacks.ending:
            log.note(f"a callback ended the session at update {step} of {total}: saved")
        else:
            past = step > (c.train.stop_at or total)
            log.note(
                f"train.stop_at={c.train.stop_at} of {total} updates: "
                f"{f'the run has {step} already' if past else 'saved'}; without it the run goes on"
            )
        log.flush()
        if left_out := left_out_text(log.counters.left_out):
            log.note(f"left out: {left_out}")
        summary = log.summary = log.counters.summary(self.model_name)
        log.patience = HURRY if told else PATIENCE
        if is_first():
            text = json.dumps(summary, indent=2) + "\n"
            if step >= total and not told:  # else the evaluation is still to come
                log.attempt(lambda: write_text(run_dir / "summary.json", text))
            log.attempt(lambda: write_report(run_dir))
            self._push(log)
        return summary

    def _evaluation_is_due(self, step: int) -> bool:
        """Whether held-out rows are answered after this update, beside before and after the run."""
        c = self.config
        last = step - self._per_round
        between = self.round is None and 0 < step < c.train.updates
        return between and crossed(last, step, c.eval.every)

    def _is_evaluated(self, step: int) -> bool:
        """Whether the answers of that evaluation are there."""
        file = self.folder / "eval" / f"{_at(step)}.jsonl"
        return self._evaluation_is_due(step) and file.is_file()

    @property
    def _per_round(self) -> int:
        """Updates on one rollout."""
        return self.config.train.steps_per_generation * self.config.train.num_iterations

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Hold the folder against other runs, for all processes of this one."""
        run, folder = self.config.run, check_claim(self.config)
        self.still_held = stack.enter_context(lock(run.dir))
        sweep(run.checkpoints)
        with usable(folder):
            sweep_temporary(folder)
        if run.overwrite:
            with usable(folder):
                self.replaces = (folder / METRICS).is_file()
                clear(run.dir)

    def _claim(self, counters: Counters) -> None:
        if counters.step == 0:
            c, per_round = self.config, self._per_round
            first_save = -(-c.checkpoint.every // per_round) * per_round
            self.lost = check_not_lost(c.run.dir, first_save)
        claim(self.config)
        push(self.config.run.dir)

    def _round(self, log: RunLog, told_to_end: Callable[[], int], save: Callable[[], None]) -> None:
        """One rollout, or as many given groups, and the updates on them, as long as it may."""
        c, counters = self.config, log.counters
        log.trace.begin(counters.step + 1)
        if self.round is None:
            self.policy.refresh_reference_if_due()
            with _kept(save, counters):
                self.round, self.done = self.feed.round(counters.rollouts), 0
            counters.rollouts += 1
        queue = self.round * c.train.num_iterations
        last = counters.step - self.done + len(self.round) - len(queue)
        for step, batch in enumerate(self.round, start=counters.step - self.done + 1):
            if batch.records and counters.step < step <= c.train.updates:
                log.completions(step, batch.records, last=last)
            if step > counters.step:
                self._look_at_early(log, batch)
            if math.isnan(batch.metrics["reward"]):
                log.note(f"step {step}: no completion has a reward, there is nothing to learn from")
            last = step
        end = min(len(queue), self.done + c.train.updates - counters.step)
        while self.done < end and not (self.done and (told_to_end() or self.callbacks.ending)):
            batch = queue[self.done]
            log.trace.begin(counters.step + 1)
            peak, at_peak = self.peak, None
            if peak is not None:
                at_peak = peak.seconds(batch.batch.prompt_lengths, batch.batch.lengths)
            metrics = self.policy.update(batch.batch, batch.plan)
            metrics, here = c.loss.told(metrics, batch.metrics)
            if self.done < len(self.round):
                counters.count(here)
            log.step(metrics, here, at_peak=at_peak)
            self.starting.close()
            self.done += 1
            if self.callbacks:
                log.flush()
                with _kept(save, counters):
                    self.callbacks.on_step_end(counters.step, dict(self.history[-1]))
        if self.done == len(queue):  # else a longer run goes on with it
            self.round, self.done = None, 0

    def _look_at_early(self, log: RunLog, batch: TrainBatch) -> None:
        """Warn once of what the first batches show, unless the run began in an earlier session."""
        if self.early is None or self.config.loss.name == "sft":
            return
        self.early.append(batch)
        batches = -(-self.config.train.updates // self.config.train.num_iterations)
        if len(self.early) == min(FIRST, batches):
            metrics = [batch.metrics for batch in self.early]
            records = [record for batch in self.early for record in batch.records]
            limit = self.config.rollout.max_completion_length
            for line in early_signs(metrics, records, limit):
                log.note(f"warning: {line}")
            self.early = None

    def _evaluate(self, log: RunLog, name: str) -> None:
        """Judge the policy by the held-out rows, if there are any, and write it down."""
        if self.held_out is None:
            return
        metrics, records = evaluate(
            self.held_out,
            self.engine,
            self.policy.params,
            self.judge,
            self.config.eval,
            max_completion_length=self.config.rollout.max_completion_length,
            checker=self.checker,
        )
        log.evaluation(name, metrics, records)
        self.callbacks.on_evaluate(log.counters.step, dict(metrics))
        self.score = log.counters.step, metrics.get("eval/accuracy", metrics["eval/reward"])
        self._push(log)

    def _save(self, log: RunLog, checkpoints: Checkpoints) -> None:
        raise_together(self.still_held)
        samples = self.feed.state()  # waits for rounds drawn ahead
        samples |= pack_round(self.round, self.done) if self.round else {}
        log.flush()
        counters = dataclasses.asdict(log.counters)
        about = {"counters": counters, "data_fingerprint": self.data_fingerprint}
        about["reward_code"] = dict(self.reward_code)
        step, (scored_at, score) = log.counters.step, self.score
        score = score if step == scored_at else math.nan
        new = step not in checkpoints.steps()
        self.policy.save(checkpoints, step, about, samples, score)
        self._push(log)
        if new:
            self.callbacks.on_save(step)

    def _push(self, log: RunLog) -> None:
        """Have the bucket hold what the run has written so far, if it is in one."""

        def copy() -> None:
            self.still_held()
            push(self.config.run.dir)

        if is_first():
            log.attempt(copy)

    def _resume(self, checkpoints: Checkpoints) -> Counters:
        """Let policy and feed take over the last whole checkpoint; all at 0 where there is none."""
        restored = self.policy.load(checkpoints)
        if restored is None:
            return self._with_left_out(Counters())
        raise_together(lambda: self._check_same(restored.extra))
        self.feed.load(restored.samples)
        counters = self._with_left_out(Counters.of_checkpoint(restored.extra["counters"]))
        before = counters.evaluations.get("before", {})
        if "eval/reward" not in before:  # version 0.1 saved the accuracy alone
            rows = from_first_host(lambda: read_history(self.folder))
            before |= next((row for row in rows if row["step"] == 0), {})
        under_way = restored.samples if counters.step < self.config.train.updates else []
        if found := unpack_round(under_way, self.policy.plan):
            self.round, self.done = found
        return counters

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        if what := _what_differs(saved["data_fingerprint"], self.data_fingerprint):
            raise UserError(
                f"{what} are not those of this run; bring them back, or {_ELSE}", page=Page.RESUMING
            )
        code = saved.get("reward_code", self.reward_code)  # version 0.1 saved none
        changed = changed_code(self.judge.reward_funcs, code)
        if changed and not self.config.rewards.allow_changed_code:
            raise UserError(
                f"the code of reward {', '.join(changed)} has changed since this run began; bring "
                f"it back, go on all the same with rewards.allow_changed_code=true, or {_ELSE}",
                page=Page.REWARD_CHANGED,
            )

    def _with_left_out(self, counters: Counters) -> Counters:
        counters.left_out = {**self.left_out, **counters.left_out}
        return counters

    def _opening(self, counters: Counters) -> list[str]:
        start = f"going on from step {counters.step}" if counters.step else "starting"
        if self.lost:
            start += f" over: {self.lost} updates were done before the first checkpoint was whole"
        lines = [f"{start}; what runs for the first time is compiled, which takes a while"]
        if self.config.rollout.params().cuts_support:
            lines.append(
                "top_k, top_p and min_p keep some tokens from ever being sampled: GVPO's optimum "
                "is then not reached, because the samples do not cover the reference"
            )
        if self.replaces:
            lines.append(f"run.overwrite: the run that was in {self.config.run.dir} is replaced")
        lines += [f"warning: {line}" for line in self.data_signs]
        left_out = left_out_text(self.left_out)
        return [*lines, f"left out: {left_out}"] if left_out else lines


def _what_differs(saved: str, now: str) -> str:
    """What two fingerprints of data tell apart; empty where they are the same."""
    there, here = map(_parts, (saved, now))
    return " and ".join(what for what in there if there[what] != here[what])


def _parts(data_fingerprint: str) -> dict[str, list[str]]:
    rows, *rest = data_fingerprint.split(".")
    held_out = rest[:1] if rest and re.fullmatch("[0-9a-f]{16}", rest[0]) else []
    names = rest[len(held_out) :]
    return {"training rows": [rows], "held-out rows": held_out, "reward functions": names}


def _why_it_ended(told: int, step: int, overwrite: bool) -> str:
    who = "interrupted" if told == signal.SIGINT else "told to end"
    if not step:
        return f"{who} before the first update: the same command starts over"
    return f"{who}: saved, the same command{' without run.overwrite' * overwrite} goes on"


@contextlib.contextmanager
def _saying_what_is_left(log: RunLog, checkpoints: Checkpoints, overwrite: bool) -> Iterator[None]:
    """Where Ctrl-C strikes in the middle of an update: what the next start finds."""
    try:
        yield
    except KeyboardInterrupt:
        steps = checkpoints.steps()
        text = "interrupted in the middle of the work: the same command"
        text += " without run.overwrite " if overwrite and steps else " "
        text += f"goes on from the checkpoint of step {max(steps)}" if steps else "starts over"
        log.note(text)
        raise Interrupted(text) from None


@contextlib.contextmanager
def _kept(save: Callable[[], None], counters: Counters) -> Iterator[None]:
    """What fails inside, such as a reward function, does not cost the updates before it."""
    try:
        yield
    except NotFinite:
        raise
    except Exception as error:
        if counters.step and jax.process_count() == 1:  # others may not know of the failure
            save()
            if isinstance(error, UserError):
                told = f"{error}; the {counters.step} updates before it are saved"
                if isinstance(error, RewardError):
                    told += ", and go on with mended code by rewards.allow_changed_code=true"
                raise type(error)(told, page=error.page) from error
        raise


def _at(step: int) -> str:
    return f"step_{step:06d}"
