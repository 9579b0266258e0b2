"""What an update trains on: new and older groups in batches, with reference log-probs."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gvpo_jax.collect.collector import Collected, Collector
from gvpo_jax.collect.lookahead import Lookahead
from gvpo_jax.collect.metrics import reward_metrics
from gvpo_jax.collect.replay import ReplayBuffer, ReplayConfig
from gvpo_jax.data.batch import Batch, Sizes
from gvpo_jax.data.groups import UNKNOWN, Groups, join, stack, take, to_batch, with_reference
from gvpo_jax.data.packing_plan import Plan
from gvpo_jax.errors import UserError
from gvpo_jax.training.policy import Policy
from gvpo_jax.training.step import TrainConfig

Arrays = dict[str, np.ndarray]
Scoring = Callable[[], tuple["TrainBatch", Groups]]  # waits for the reference's log-probs


class TrainBatch(NamedTuple):
    """A batch to update on, how, what there is to tell of it, and its new completions as texts."""

    batch: Batch
    plan: Plan
    metrics: dict[str, float]
    records: list[dict[str, Any]]


class Feed(Protocol):
    """Gives the batches of a run in rounds of `train.steps_per_generation`."""

    def round(self, number: int) -> list[TrainBatch]:
        """The batches of this round."""
        ...

    def state(self) -> Arrays:
        """What this process's next rounds depend on."""
        ...

    def load(self, states: Sequence[Arrays]) -> None:
        """Take over what all the processes' `state` gave, be they more or fewer than now."""
        ...

    def close(self) -> None:
        """End what is under way."""
        ...


class OnlineFeed:
    """Groups that the policy samples, now or ahead of time, with older ones mixed in.

    `train` says how many batches make a round, and how many rounds there are; `replay`, how many
    older ones are mixed in.
    """

    def __init__(
        self, policy: Policy, collector: Collector, train: TrainConfig, replay: ReplayConfig
    ):
        self._policy, self._collector = policy, collector
        self._train, self._replay = train, replay
        options, prompts = collector.options, len(collector.prompts.rows)
        if replay.completions and prompts > replay.capacity:
            raise UserError(
                f"replay.capacity={replay.capacity} groups are forgotten before one of "
                f"{prompts} prompts comes again: raise it to at least as many"
            )
        if options.lookahead and jax.process_count() > 1:
            raise UserError(
                "rollout.lookahead needs a single process: programs of two threads may reach the "
                "devices in another order on each host"
            )
        longest = collector.prompts.longest, options.max_completion_length
        self._largest = Sizes(train.batch_size, options.num_generations, *longest)
        self._remembers = bool(replay.completions or replay.groups)
        self._buffer = ReplayBuffer(replay.capacity, collector.seed)
        self._ahead: Lookahead[list[Collected]] | None = None
        if options.lookahead:
            of_round = train.steps_per_generation * train.num_iterations
            self._ahead = Lookahead(
                lambda number, at: self._collect(number, *at),
                lambda: (policy.snapshot(), policy.updates),
                ahead=options.lookahead,
                last=-(-train.updates // of_round) - 1,
                interrupt=collector.engine.close,
            )

    def round(self, number: int) -> list[TrainBatch]:
        """The round's batches, with reference log-probs; then its groups are remembered."""
        if self._ahead:
            drawn = self._ahead.take(number)
        else:
            drawn = self._collect(number, self._policy.params, self._policy.updates)
        first = number * len(drawn)
        mixed = [self._mix(first + place, collected) for place, collected in enumerate(drawn)]
        if self._remembers:
            for _, new in mixed:
                self._buffer.add(new)
        return [batch for batch, _ in mixed]

    def state(self) -> Arrays:
        """The replay buffer and the rounds drawn ahead."""
        arrays = over(self._buffer.state(), "replay") if self._remembers else {}
        pending = self._ahead.pending() if self._ahead else {}
        about = []
        for number, batches in pending.items():
            for place, (groups, metrics, records) in enumerate(batches):
                arrays |= over(groups._asdict(), f"ahead/{number}/{place}")
                about.append([number, place, metrics, records])
        if about:
            arrays["ahead"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        return arrays

    def load(self, states: Sequence[Arrays]) -> None:
        """Take over what `state` gave; other processes than before deal the buffer out again."""
        processes, here = jax.process_count(), jax.process_index()
        remembered = [saved_groups(state, "replay") for state in states]
        if self._remembers and len(states) == processes:
            self._buffer.load(remembered[here])
        elif self._remembers and (everything := [groups for groups in remembered if groups]):
            self._buffer.load(take(stack(everything), slice(here, None, processes)))
        if self._ahead and "ahead" in (state := states[0]):
            rounds: dict[int, list[Collected]] = {}
            for number, place, metrics, records in json.loads(bytes(state["ahead"])):
                groups = saved_groups(state, f"ahead/{number}/{place}")
                assert groups is not None
                rounds.setdefault(number, []).append(Collected(groups, metrics, records))
            self._ahead.load(rounds)

    def close(self) -> None:
        """End the sampling thread."""
        if self._ahead:
            self._ahead.close()

    def _collect(self, number: int, params: Any, updates: int) -> list[Collected]:
        of_round = self._train.steps_per_generation
        numbers = range(number * of_round, (number + 1) * of_round)
        return self._collector.collect(numbers, params, updates)

    def _mix(self, key: int, drawn: Collected) -> tuple[TrainBatch, Groups]:
        """A batch of new and older completions; and its new groups with reference log-probs."""
        groups, r = drawn.groups, self._replay
        if r.completions:
            places = range(len(groups.row))
            groups = stack([self._with_older(key, i, take(groups, [i])) for i in places])
        if r.groups:
            older = self._buffer.groups(r.groups // jax.process_count(), key)
            groups = stack([groups, *older])
        batch, groups = send_groups(self._policy, groups, self._largest)()
        batch = batch._replace(metrics=batch.metrics | drawn.metrics, records=drawn.records)
        return batch, take(groups, slice(len(drawn.groups.row)))

    def _with_older(self, key: int, place: int, group: Groups) -> Groups:
        key = key * self._train.batch_size + place  # a row may come twice in a batch
        older = self._buffer.completions(int(group.row[0]), self._replay.completions, key)
        return group if older is None else join(group, older)


def send_groups(policy: Policy, groups: Groups, largest: Sizes) -> Scoring:
    """A batch that the reference scores where its log-probs are not cached; its groups then.

    largest: the groups of all processes that the batch is filled up to, and what `to_batch` asks.
    """
    batch = to_batch(groups, longest_prompt=largest.p, longest_completion=largest.t, k=largest.k)
    batch = policy.pad(batch, -(-largest.groups // jax.process_count()))
    reference = policy.reference_fingerprint
    known = np.ones(len(batch.rewards), bool)  # what only fills up needs no scores
    known[: len(groups.row)] = (groups.reference == reference) & (reference != UNKNOWN)
    plan = policy.plan(batch)  # now: to agree on it later would wait for an update
    received = policy.send_to_reference(batch, known)

    def scoring() -> tuple[TrainBatch, Groups]:
        scored = received()
        ready = TrainBatch(scored, plan, reward_metrics(scored), [])
        return ready, with_reference(groups, np.asarray(scored.ref_logps), reference)

    return scoring


def over(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays under names that begin with a prefix."""
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def saved_groups(arrays: Arrays, prefix: str) -> Groups | None:
    """Groups that `over` put among these arrays; None: there are none.

    Raises:
        UserError: an earlier version saved them.
    """
    start = f"{prefix}/"
    found = {name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)}
    if found and set(found) != set(Groups._fields):
        raise UserError(
            "version 0.1 saved this run's replayed or pending samples in another form: end the "
            "run with that version, or choose another run.dir"
        )
    return Groups(**found) if found else None


def pack_round(batches: Sequence[TrainBatch], done: int) -> Arrays:
    """A round of which `done` updates are done, as arrays to be saved."""
    about = [[batch.metrics, batch.records] for batch in batches]
    arrays = {"round": np.frombuffer(json.dumps([done, about]).encode(), np.uint8)}
    for place, batch in enumerate(batches):
        arrays |= over(batch.batch._asdict(), f"round/{place}")
    return arrays


def unpack_round(
    states: Sequence[Arrays], plan: Callable[[Batch], Plan]
) -> tuple[list[TrainBatch], int] | None:
    """What `pack_round` was given in each process; None: there was no round under way.

    plan: how an update is to compute a batch.

    Raises:
        UserError: there are more or fewer processes than then.
    """
    if not states or "round" not in states[0]:
        return None
    if len(states) != jax.process_count():
        raise UserError(
            f"the run was ended in the middle of a round by {len(states)} processes, and goes on "
            f"with as many; here are {jax.process_count()}"
        )
    arrays, batches = states[jax.process_index()], []
    done, about = json.loads(bytes(arrays["round"]))
    for place, (metrics, records) in enumerate(about):
        batch = Batch(**{name: arrays[f"round/{place}/{name}"] for name in Batch._fields})
        batches.append(TrainBatch(batch, plan(batch), metrics, records))
    return batches, done
