"""What an update trains on: new groups, older ones and given ones, mixed into batches."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gvpo_jax.collect.collector import Collected, Collector
from gvpo_jax.collect.lookahead import Lookahead
from gvpo_jax.collect.metrics import reward_metrics
from gvpo_jax.collect.replay import ReplayBuffer
from gvpo_jax.config import Config
from gvpo_jax.data.batch import Batch
from gvpo_jax.data.groups import UNKNOWN, Group, cut, join, make_batch, pack, unpack
from gvpo_jax.data.packing_plan import Plan
from gvpo_jax.data.rows import EncodedPrompts
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import max_over_hosts
from gvpo_jax.rundir.files import to_json
from gvpo_jax.training.policy import Policy

Arrays = dict[str, np.ndarray]
Scoring = Callable[[], tuple["TrainBatch", list[Group]]]  # waits for the reference's log-probs


class TrainBatch(NamedTuple):
    """A batch to update on, how, what there is to tell of it, and its new completions as texts."""

    batch: Batch
    plan: Plan
    metrics: dict[str, float]
    records: list[dict[str, Any]]


class Feed(Protocol):
    """Gives the batches of a run, round by round; a round is `train.steps_per_generation` of them.

    `state` is what this process's next rounds depend on, as arrays; `load` takes over what all the
    processes had, be they more or fewer than now.
    """

    def round(self, number: int) -> list[TrainBatch]: ...

    def state(self) -> Arrays: ...

    def load(self, states: Sequence[Arrays]) -> None: ...

    def close(self) -> None: ...


class OnlineFeed:
    """Groups that the policy samples, now or ahead of time, with older ones mixed in."""

    def __init__(
        self, policy: Policy, config: Config, collector: Collector, prompts: EncodedPrompts
    ):
        self._policy, self._config, self._longest = policy, config, prompts.longest
        if config.replay.completions and len(prompts.rows) > config.replay.capacity:
            raise UserError(
                f"replay.capacity={config.replay.capacity} groups are forgotten before one of "
                f"{len(prompts.rows)} prompts comes again: raise it to at least as many"
            )
        self._replay = ReplayBuffer(config.replay.capacity, config.run.seed)
        per_round = config.train.steps_per_generation
        given = collector.demonstrations(prompts) if config.rollout.demonstrations else None
        lost = sum(int((group.lengths == 0).sum()) for group in given or ())
        self.notes = [f"{lost} demonstrations skipped: data.bad_samples=skip"] if lost else []

        def draw(number: int, at: "_Version") -> list[Collected]:
            numbers = range(number * per_round, (number + 1) * per_round)
            return collector.collect(numbers, prompts, given, at.params, at.updates)

        self._draw = draw
        self._ahead: Lookahead[list[Collected]] | None = None
        if config.rollout.lookahead and jax.process_count() > 1:
            raise UserError(
                "rollout.lookahead needs a single process: programs of two threads may reach the "
                "devices in another order on each host"
            )
        if config.rollout.lookahead:
            last = -(-config.train.steps // (per_round * config.train.num_iterations)) - 1
            self._ahead = Lookahead(
                draw,
                lambda: _Version(policy.snapshot(), policy.updates),
                ahead=config.rollout.lookahead,
                last=last,
                interrupt=policy.close,
            )

    def round(self, number: int) -> list[TrainBatch]:
        """The round's batches, with reference log-probs; then its groups are remembered."""
        if self._ahead:
            drawn = self._ahead.take(number)
        else:
            drawn = self._draw(number, _Version(None, self._policy.updates))
        first = number * len(drawn)
        fed = [self._mix(first + place, batch) for place, batch in enumerate(drawn)]
        if self._remembers:
            for _, scored in fed:
                self._replay.add(scored)
        return [f for f, _ in fed]

    def state(self) -> Arrays:
        """The replay buffer and the rounds drawn ahead."""
        arrays = _over(self._replay.state(), "replay") if self._remembers else {}
        pending = self._ahead.pending() if self._ahead else {}
        told = []
        for number, batches in pending.items():
            for place, (groups, metrics, records) in enumerate(batches):
                arrays |= _over(pack(groups), f"ahead/{number}/{place}")
                # Rows of data may hold what JSON does not know.
                told.append([number, place, metrics, json.loads(to_json(records))])
        if told:
            arrays["ahead"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
        return arrays

    def load(self, states: Sequence[Arrays]) -> None:
        """Take over what `state` gave; other processes than before deal the buffer out again."""
        processes, here = jax.process_count(), jax.process_index()
        if self._remembers and len(states) == processes:
            self._replay.load(_under(states[here], "replay"))
        elif self._remembers:
            everything = [g for state in states for g in unpack(_under(state, "replay"))]
            self._replay.load(pack(everything[here::processes]))
        if self._ahead and "ahead" in (state := states[0]):
            rounds: dict[int, list[Collected]] = {}
            for number, place, metrics, records in json.loads(bytes(state["ahead"])):
                groups = unpack(_under(state, f"ahead/{number}/{place}"))
                rounds.setdefault(number, []).append(Collected(groups, metrics, records))
            self._ahead.load(rounds)

    def close(self) -> None:
        """End the sampling thread."""
        if self._ahead:
            self._ahead.close()

    @property
    def _remembers(self) -> bool:
        return bool(self._config.replay.completions or self._config.replay.groups)

    def _mix(self, key: int, drawn: Collected) -> tuple[TrainBatch, list[Group]]:
        """A batch of new and older completions; and the groups in it with reference log-probs."""
        r = self._config.replay
        groups = [self._with_older(key, place, g) for place, g in enumerate(drawn.groups)]
        if r.groups:
            groups += self._replay.groups(r.groups // jax.process_count(), key)
        c = self._config
        k = c.rollout.num_generations
        fed, groups = send_groups(self._policy, groups, c, self._longest, k)()
        metrics = fed.metrics | drawn.metrics
        return fed._replace(metrics=metrics, records=drawn.records), groups[: len(drawn.groups)]

    def _with_older(self, key: int, place: int, group: Group) -> Group:
        if not self._config.replay.completions:
            return group
        key = key * self._config.train.batch_size + place  # a row may come twice in a batch
        older = self._replay.completions(group.row, self._config.replay.completions, key)
        return group if older is None else join(group, older)


def send_groups(
    policy: Policy, groups: list[Group], config: Config, longest_prompt: int, k: int | None = None
) -> Scoring:
    """A batch that the reference scores where its log-probs are not cached; its groups then."""
    batch = make_batch(
        groups,
        longest_prompt=longest_prompt,
        longest_completion=config.rollout.max_completion_length,
        k=k,
        agree=max_over_hosts,
    )
    batch = policy.pad(batch, -(-config.train.batch_size // jax.process_count()))
    reference = policy.reference_fingerprint
    known = np.ones(len(batch.rewards), bool)  # what only fills up needs no scores
    known[: len(groups)] = [g.reference == reference != UNKNOWN for g in groups]
    plan = policy.plan(batch)  # now: to agree on it later would wait for an update
    received = policy.send_to_reference(batch, known)

    def scoring() -> tuple[TrainBatch, list[Group]]:
        scored = received()
        cuts = [cut(scored, place, group, reference) for place, group in enumerate(groups)]
        return TrainBatch(scored, plan, reward_metrics(scored), []), cuts

    return scoring


class _Version(NamedTuple):
    """Parameters to sample with (None: the current ones), and the updates that they have seen."""

    params: Any
    updates: int


def _over(arrays: Arrays, prefix: str) -> Arrays:
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def _under(arrays: Arrays, prefix: str) -> Arrays:
    start = prefix + "/"
    return {
        name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)
    }
