"""Groups sampled elsewhere: rows with `prompt`, `completions` and `rewards`, of any group sizes.

    {"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"], "rewards": [1, 0, 0.5]}

A completion is a text, to which the end token is added, or a list of token ids, taken as it is.
`ref_logps` may hold the reference's log-probs in nats: per completion a list with one number per
token, end token included. Then `ref_fingerprint` says of which reference and which tokens they are:
`gvpo_jax.data.groups.cache_key`, which `Trainer.with_reference_logps` writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from gvpo_jax.collect.feed import Arrays, Scoring, TrainBatch, _over, _under, send_groups
from gvpo_jax.config import Config
from gvpo_jax.data.groups import (
    UNKNOWN,
    Group,
    Source,
    cache_key,
    length_problem,
    make_group,
    pack,
    read_reward,
    take,
    unpack,
)
from gvpo_jax.data.rows import batch_indices
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import my_slice
from gvpo_jax.training.policy import Policy


@dataclass(frozen=True)
class OfflineGroups:
    """Groups to train on, and how many completions and whole groups were left out as bad."""

    groups: list[Group]
    skipped_completions: int
    skipped_groups: int


def read_groups(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    encode: Callable[[str], list[int]],
    *,
    reference: int,
    vocab_size: int,
    max_completion_length: int,
    bad_samples: Literal["error", "skip"] = "error",
) -> OfflineGroups:
    """The rows as groups of token ids.

    Args:
        rows: see above; other columns are not looked at.
        prompts: the rows' prompts as token ids.
        encode: a completion's text -> token ids, end token included.
        reference: fingerprint of the run's reference, or `UNKNOWN` where it keeps changing.
        vocab_size: token ids are less.
        max_completion_length: tokens.
        bad_samples: what becomes of a completion that is empty, too long or without a finite
            reward, and of a group that keeps fewer than two: `skip` counts them.

    Raises:
        UserError: naming the row (from 1), for these, for columns that do not fit together, for
            reference log-probs of another reference, and where no group is left.
    """
    groups: list[Group] = []
    skipped = 0
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
        name = f"groups, row {number}"
        ids = _completions(name, row, encode, vocab_size)
        values: Any = row.get("rewards")
        if not _is_list(values):
            raise UserError(f"{name}: the column 'rewards' must be a list of numbers")
        if len(ids) != len(values):
            raise UserError(f"{name}: {len(ids)} completions but {len(values)} rewards")
        rewards: list[float | None] = [None] * len(ids)
        problems: dict[int, str] = {}
        for place, value in enumerate(values):
            if value is not None and not isinstance(value, Real):
                raise UserError(f"{name}: a reward is a number, got {value!r}")
            try:
                rewards[place] = read_reward(value)
                problem = length_problem(ids[place], max_completion_length)
                problem = problem or ("it has no reward" if rewards[place] is None else None)
            except UserError as error:
                problem = str(error)
            if problem:
                problems[place] = problem
        group = make_group(prompt, ids, rewards, source=Source.FILE, row=number - 1)
        group = _with_cache(name, row, group, reference)
        good = [place for place in range(len(ids)) if place not in problems]
        if bad_samples == "error":
            for place, problem in problems.items():
                raise UserError(f"{name}, completion {place + 1}: {problem}{_HINT}")
            if len(good) < 2:
                raise UserError(f"{name}: a group needs at least two completions{_HINT}")
        skipped += len(problems)
        if len(good) >= 2:
            groups.append(take(group, good))
    if not groups:
        raise UserError(f"none of the {len(rows)} groups has two completions to compare")
    return OfflineGroups(groups, skipped, len(rows) - len(groups))


_HINT = "; data.bad_samples=skip leaves out what can't be used"


def _completions(name: str, row: Mapping[str, Any], encode, vocab_size: int) -> list[list[int]]:
    texts: Any = row.get("completions")
    if not _is_list(texts):
        raise UserError(f"{name}: the column 'completions' must be a list of texts")
    ids = []
    for text in texts:
        if isinstance(text, str):
            ids.append(encode(text))
        elif _is_list(text) and all(
            isinstance(t, int | np.integer) and 0 <= t < vocab_size for t in text
        ):
            ids.append([int(token) for token in text])
        else:
            raise UserError(
                f"{name}: a completion is a text or a list of token ids below {vocab_size}, "
                f"got {str(text)[:80]!r}"
            )
    return ids


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _with_cache(name: str, row: Mapping[str, Any], group: Group, reference: int) -> Group:
    """The group with the row's reference log-probs, if it has any and they can be used."""
    cached = row.get("ref_logps")
    if cached is None:
        return group
    theirs = row.get("ref_fingerprint")
    if theirs is None:
        raise UserError(
            f"{name}: ref_logps without ref_fingerprint, which says whose they are; leave them "
            "out, and they are computed"
        )
    if reference == UNKNOWN:
        return group
    if theirs != cache_key(reference, group):
        raise UserError(
            f"{name}: its ref_logps are of another reference, or of other tokens (chat template, "
            "system prompt, tokenizer) than this run's; leave them out, and they are computed"
        )
    if not _fits(cached, group):
        raise UserError(
            f"{name}: ref_logps must hold a list per completion, with a finite number per token "
            f"(here {group.lengths.tolist()}, end tokens included)"
        )
    ref_logps = np.zeros_like(group.ref_logps)
    for place, values in zip(ref_logps, cached, strict=True):
        place[: len(values)] = values
    return group._replace(ref_logps=ref_logps, reference=reference)


def _fits(cached: Any, group: Group) -> bool:
    return (
        _is_list(cached)
        and all(_is_list(values) for values in cached)
        and [len(values) for values in cached] == group.lengths.tolist()
        and all(isinstance(v, float | int) and abs(v) < 1e30 for values in cached for v in values)
    )


class OfflineFeed:
    """Groups sampled elsewhere, in an order that depends on the seed alone.

    Reference log-probs are kept with the groups for as long as the reference stays.
    """

    def __init__(self, policy: Policy, config: Config, groups: list[Group]):
        self._policy, self._config, self._groups = policy, config, list(groups)
        self._longest = max(len(group.prompt) for group in groups)
        self._k = max(len(group.lengths) for group in groups)
        self._ahead: tuple[int, Scoring] | None = None
        updates = -(-config.train.steps // config.train.num_iterations)
        per_round = config.train.steps_per_generation
        self._last = -(-updates // per_round) * per_round - 1

    def round(self, number: int) -> list[TrainBatch]:
        """The round's batches, with reference log-probs."""
        per_round = self._config.train.steps_per_generation
        return [self._batch(number * per_round + place) for place in range(per_round)]

    def state(self) -> Arrays:
        """The reference log-probs so far: scored in other batches they would round otherwise."""
        places = [i for i, group in enumerate(self._groups) if group.reference != UNKNOWN]
        if not places:
            return {}
        packed = pack([self._groups[i] for i in places])
        return {"places": np.array(places), **_over(packed, "groups")}

    def load(self, states: Sequence[Arrays]) -> None:
        """Take over what `state` gave, whichever process had it."""
        for state in states:
            if "places" in state:
                for place, group in zip(
                    state["places"].tolist(), unpack(_under(state, "groups")), strict=True
                ):
                    self._groups[place] = group

    def close(self) -> None:
        """Nothing to end."""

    def _batch(self, number: int) -> TrainBatch:
        """A batch; the next one is sent to the reference before the update on this one is.

        So the devices have that update to do while this process waits for the next one's scores,
        and makes a batch of them.
        """
        ahead, self._ahead = self._ahead, None
        scoring = ahead[1] if ahead and ahead[0] == number else self._send(number)
        fed, groups = scoring()
        for i, group in zip(self._indices(number), groups, strict=True):
            self._groups[i] = group
        if number < self._last and self._config.reference.name == "initial":
            self._ahead = number + 1, self._send(number + 1)
        return fed

    def _send(self, number: int) -> Scoring:
        groups = [self._groups[i] for i in self._indices(number)]
        return send_groups(self._policy, groups, self._config, self._longest, self._k)

    def _indices(self, number: int) -> np.ndarray:
        c = self._config
        every = batch_indices(len(self._groups), c.train.batch_size, number, c.run.seed)
        return every[my_slice(c.train.batch_size)]
