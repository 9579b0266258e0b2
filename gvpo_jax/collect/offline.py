"""Groups sampled elsewhere: rows with `prompt`, `completions` and `rewards`, of any group sizes.

    {"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"], "rewards": [1, 0, 0.5]}

A completion is a text, to which the end token is added unless it ends in one, a list with one
message of the assistant, which is the same, or a list of token ids, taken as it is.
`ref_logps` may hold the reference's log-probs in nats: per completion a list with one number per
token, end token included. Then `ref_fingerprint` says of which reference and which tokens they are:
`gvpo_jax.data.groups.cache_key`, which `Trainer.with_reference_logps` writes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gvpo_jax.collect.feed import Arrays, Scoring, TrainBatch, send_groups
from gvpo_jax.data.batch import Sizes, padded
from gvpo_jax.data.groups import (
    UNKNOWN,
    Groups,
    Source,
    cache_key,
    length_problem,
    make_group,
    pick,
    read_number,
    read_reward,
    stack,
    take,
    token_lists,
    trim,
    with_reference,
)
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.data.rows import batch_indices
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import my_slice
from gvpo_jax.training.policy import Policy
from gvpo_jax.training.step import TrainConfig


class OfflineGroups(NamedTuple):
    """Groups to train on, and how many completions and whole groups were left out as bad."""

    groups: list[Groups]
    skipped_completions: int
    skipped_groups: int


def read_groups(
    prompts: EncodedPrompts,
    encode: Callable[[str], list[int]],
    *,
    reference: int,
    vocab_size: int,
    max_completion_length: int,
    bad_samples: Literal["error", "skip"] = "error",
) -> OfflineGroups:
    """The rows as groups of token ids.

    Args:
        prompts: with their rows, see above; other columns are not looked at.
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
    groups: list[Groups] = []
    skipped = 0
    for number, (row, prompt) in enumerate(zip(prompts.rows, prompts.token_ids, strict=True)):
        name = f"groups, {getattr(row, 'place', f'row {number + 1}')}"
        ids = _completions(name, row, encode, vocab_size)
        values: Any = row.get("rewards")
        if not _is_list(values):
            raise UserError(f"{name}: {_no_list(row, 'rewards', 'numbers')}")
        if len(ids) != len(values):
            raise UserError(f"{name}: {len(ids)} completions but {len(values)} rewards")
        rewards: list[float | None] = [None] * len(ids)
        good = []
        for place, value in enumerate(values):
            try:
                read_number(value)
            except UserError as error:  # no sample is bad then, but the file
                raise UserError(f"{name}: {error}") from None
            try:
                rewards[place] = read_reward(value)
                problem = length_problem(ids[place], max_completion_length)
                problem = problem or ("it has no reward" if rewards[place] is None else None)
            except UserError as error:
                problem = str(error)
            if problem is None:
                good.append(place)
            elif bad_samples == "error":
                raise UserError(f"{name}, completion {place + 1}: {problem}{_HINT}")
        group = make_group(prompt, ids, rewards, source=Source.FILE, row=number)
        group = _with_cache(name, row, group, reference)
        skipped += len(ids) - len(good)
        if len(good) >= 2:
            groups.append(trim(pick(group, good)))
        elif bad_samples == "error":
            raise UserError(f"{name}: a group needs at least two completions{_HINT}")
    if not groups:
        raise UserError(f"none of the {len(prompts.rows)} groups has two completions to compare")
    return OfflineGroups(groups, skipped, len(prompts.rows) - len(groups))


_HINT = "; data.bad_samples=skip leaves out what can't be used"


def _completions(name: str, row: Mapping[str, Any], encode, vocab_size: int) -> list[list[int]]:
    texts: Any = row.get("completions")
    if not _is_list(texts):
        raise UserError(f"{name}: {_no_list(row, 'completions', 'texts')}")
    ids = []
    for place, given in enumerate(texts, start=1):
        completion = content(given)
        if isinstance(completion, str):
            try:
                ids.append(encode(completion))
            except UserError as error:
                raise UserError(f"{name}, completion {place}: {error}") from None
        elif _is_list(completion) and all(
            isinstance(t, int | np.integer) and 0 <= t < vocab_size for t in completion
        ):
            ids.append([int(token) for token in completion])
        else:
            raise UserError(
                f"{name}: a completion is a text, a list with one message of the assistant or a "
                f"list of token ids below {vocab_size}, got {str(given)[:80]!r}"
            )
    return ids


def content(completion: Any) -> Any:
    """The text of a completion that is a list with one message of the assistant."""
    message = completion[0] if _is_list(completion) and len(completion) == 1 else None
    if isinstance(message, Mapping) and message.get("role") == "assistant":
        return message.get("content")
    return completion


def _no_list(row: Mapping[str, Any], column: str, what: str) -> str:
    if column in row:
        return f"the column '{column}' must be a list of {what}"
    return f"no column '{column}'; the columns are {', '.join(map(str, row))}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _with_cache(name: str, row: Mapping[str, Any], group: Groups, reference: int) -> Groups:
    """The group with the row's reference log-probs, if it has any and they can be used."""
    cached, theirs = row.get("ref_logps"), row.get("ref_fingerprint")
    if cached is None:
        return group
    if theirs is None:
        raise UserError(
            f"{name}: ref_logps without ref_fingerprint, which says whose they are; leave them "
            "out, and they are computed"
        )
    if reference == UNKNOWN:
        return group
    if theirs != cache_key(reference, group):
        raise UserError(
            f"{name}: its ref_logps are of another reference, or of other tokens (chat template "
            "and its date, system prompt, tokenizer) than this run's; leave them out, and they are "
            "computed"
        )
    if not _fits(cached, group):
        raise UserError(
            f"{name}: ref_logps must hold a list per completion, with a finite number per token "
            f"(here {group.lengths[0].tolist()}, end tokens included)"
        )
    return with_reference(group, padded(cached, dtype=np.float32)[None], reference)


def _fits(cached: Any, group: Groups) -> bool:
    return (
        _is_list(cached)
        and all(_is_list(values) for values in cached)
        and [len(values) for values in cached] == group.lengths[0].tolist()
        and all(isinstance(v, float | int) and abs(v) < 1e30 for values in cached for v in values)
    )


class OfflineFeed:
    """Groups sampled elsewhere, in an order that depends on the seed alone, or in their own.

    Reference log-probs are kept with the groups for as long as the reference stays.

    `train` says how many batches make a round, and how many there are; `longest_completion`, how
    many tokens one may have; `ahead`, whether the reference stays, so that a batch may be scored
    before its turn.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[Groups],
        train: TrainConfig,
        *,
        longest_completion: int,
        seed: int,
        shuffle: bool,
        ahead: bool,
    ):
        self._policy, self._groups, self._train = policy, list(groups), train
        self._seed, self._shuffle = seed, shuffle
        k = max(group.lengths.shape[1] for group in groups)
        longest_prompt = max(group.prompts.shape[1] for group in groups)
        self._largest = Sizes(train.batch_size, k, longest_prompt, longest_completion)
        self._sent: dict[int, Scoring] = {}
        updates, of_round = -(-train.updates // train.num_iterations), train.steps_per_generation
        self._last = -(-updates // of_round) * of_round - 1 if ahead else -1

    def round(self, number: int) -> list[TrainBatch]:
        """The round's batches, with reference log-probs."""
        of_round = self._train.steps_per_generation
        return [self._batch(number * of_round + place) for place in range(of_round)]

    def state(self) -> Arrays:
        """The reference log-probs so far: scored in other batches they would round otherwise."""
        known = [i for i, group in enumerate(self._groups) if group.reference[0] != UNKNOWN]
        if not known:
            return {}
        groups = [self._groups[i] for i in known]
        return {
            "places": np.array(known),
            "ref_logps": np.concatenate([group.ref_logps.ravel() for group in groups]),
            "reference": np.concatenate([group.reference for group in groups]),
        }

    def load(self, states: Sequence[Arrays]) -> None:
        """Take over what `state` gave, whichever process had it."""
        for state in states:
            if "ref_logps" not in state:  # version 0.1 kept them otherwise: they are scored again
                continue
            rest = state["ref_logps"]
            for place, reference in zip(state["places"], state["reference"], strict=True):
                group = self._groups[place]
                logps, rest = np.split(rest, [group.ref_logps.size])
                logps = logps.reshape(group.ref_logps.shape)
                self._groups[place] = with_reference(group, logps, reference)

    def close(self) -> None:
        """Nothing to end."""

    def _batch(self, number: int) -> TrainBatch:
        """A batch; the next one is sent to the reference before the update on this one is.

        So the devices have that update to do while this process waits for the next one's scores,
        and makes a batch of them.
        """
        scoring = self._sent.pop(number, None) or self._send(number)
        batch, scored = scoring()
        for row, place in enumerate(self._indices(number)):
            logps, reference = scored.ref_logps[[row]], scored.reference[row]
            self._groups[place] = with_reference(self._groups[place], logps, reference)
        if number < self._last:
            self._sent[number + 1] = self._send(number + 1)
        return batch

    def _send(self, number: int) -> Scoring:
        groups = stack([self._groups[i] for i in self._indices(number)])
        return send_groups(self._policy, groups, self._largest)

    def _indices(self, number: int) -> np.ndarray:
        size = self._train.batch_size
        count = len(self._groups)
        every = batch_indices(count, size, number, self._seed, shuffle=self._shuffle)
        return every[my_slice(size)]


def rows_with_reference(
    policy: Policy,
    prompts: EncodedPrompts,
    groups: Sequence[Groups],
    size: int,
    longest_completion: int,
) -> list[dict[str, Any]]:
    """The groups' rows with token ids, `ref_logps` and `ref_fingerprint`, scored `size` at a time.

    Raises:
        UserError: every update changes the reference.
    """
    if policy.reference_fingerprint == UNKNOWN:
        raise UserError("reference.name=ema changes with every update: nothing can be kept")
    largest, rows = Sizes(size, 0, prompts.longest, longest_completion), []
    for start in range(0, len(groups), size):
        _, scored = send_groups(policy, stack(groups[start : start + size]), largest)()
        for place in range(len(scored.row)):
            group = take(scored, [place])
            group = pick(group, np.flatnonzero(group.lengths[0]))
            rows.append(
                {
                    **prompts.rows[group.row[0]],
                    "completions": token_lists(group.completions, group.lengths),
                    "rewards": group.rewards[0].tolist(),
                    "ref_logps": token_lists(group.ref_logps, group.lengths),
                    "ref_fingerprint": cache_key(int(group.reference[0]), group),
                }
            )
    return rows
