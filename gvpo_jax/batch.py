"""One batch of groups: what rollout, rewards and scoring fill in and the train step reads."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.errors import UserError

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """g groups of k completions. Masks come from lengths and `valid`, never from token values.

    Attributes:
        prompts: `[g, p]` int32, padded on the right.
        prompt_lengths: `[g]` int32, at least 1.
        completions: `[g, k, t]` int32, padded on the right.
        lengths: `[g, k]` int32, the end token included.
        rewards: `[g, k]` float32; what stands at an invalid completion does not matter.
        valid: `[g, k]` booleans: completions that have a reward.
        ref_logps: `[g, k, t]` float32 token log-probs under the reference, in nats.
    """

    prompts: Array
    prompt_lengths: Array
    completions: Array
    lengths: Array
    rewards: Array
    valid: Array
    ref_logps: Array


def pad_prompts(
    prompts: Sequence[Sequence[int]], longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad to the next bucket: token ids `[g, p]` and lengths `[g]`, int32.

    Args:
        prompts: g lists of token ids.
        longest: length of the longest prompt there will be in the run, where it is known. Then the
            buckets are that length, its half and its quarter: three widths to compile at most.

    Raises:
        ValueError: no prompt, or one without a token.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError("every prompt needs at least one token: give it some text")
    width = int(lengths.max())
    width = bucket(width) if longest is None else _fraction(width, longest)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def bucket(length: int, smallest: int = 16) -> int:
    """The padded length: 16, 24, 32, 48, 64, 96, ... whichever is the first that fits."""
    size = smallest
    while size < length:
        half = size + size // 2
        if half >= length:
            return half
        size *= 2
    return size


def _fraction(width: int, longest: int) -> int:
    sizes = (-(-longest // (parts * 8)) * 8 for parts in (4, 2, 1))  # multiples of 8
    return next((size for size in sizes if size >= width), bucket(width))


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: np.ndarray,
    lengths: np.ndarray,
    rewards: np.ndarray,
    longest_prompt: int | None = None,
) -> Batch:
    """A batch, its reference log-probs still 0, its completions cut to the longest one's bucket.

    Args:
        prompts: g lists of token ids.
        completions: `[g, k, t]` token ids.
        lengths: `[g, k]` tokens of each completion; 0 marks one that is not there.
        rewards: `[g, k]`, NaN where a completion has none.
        longest_prompt: see `pad_prompts`.
    """
    padded, prompt_lengths = pad_prompts(prompts, longest_prompt)
    width = min(completions.shape[-1], bucket(int(lengths.max())))
    valid = ~np.isnan(rewards) & (lengths > 0)
    return Batch(
        prompts=padded,
        prompt_lengths=prompt_lengths,
        completions=completions[..., :width].astype(np.int32),
        lengths=lengths.astype(np.int32),
        rewards=np.where(valid, rewards, 0).astype(np.float32),
        valid=valid,
        ref_logps=np.zeros((*lengths.shape, width), np.float32),
    )


def batch_of_groups(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
    rewards: Sequence[Sequence[float | None]],
    *,
    max_completion_length: int,
) -> Batch:
    """A batch of ragged groups: per prompt, completions' token ids and rewards (None or NaN: none).

    Raises:
        UserError: lists that do not fit together, too long a completion, an infinite reward, or no
            group with two rewards.
    """
    if not len(prompts) == len(groups) == len(rewards):
        raise UserError(
            f"got {len(groups)} groups of completions and {len(rewards)} of rewards for "
            f"{len(prompts)} prompts; give one of each per prompt"
        )
    for number, (group, values) in enumerate(zip(groups, rewards, strict=True), start=1):
        if len(group) != len(values):
            raise UserError(
                f"group {number} has {len(group)} completions but {len(values)} rewards"
            )
        longest = max(map(len, group), default=0)
        if longest > max_completion_length:
            raise UserError(
                f"group {number} has a completion of {longest} tokens; "
                f"raise max_completion_length, now {max_completion_length}"
            )
    k = max(map(len, groups), default=0)
    t = max((len(completion) for group in groups for completion in group), default=0)
    tokens = np.zeros((len(groups), k, bucket(t)), np.int32)
    lengths = np.zeros((len(groups), k), np.int32)
    table = np.full((len(groups), k), np.nan)
    for g, i in ((g, i) for g, group in enumerate(groups) for i in range(len(group))):
        tokens[g, i, : len(groups[g][i])] = groups[g][i]
        lengths[g, i], value = len(groups[g][i]), rewards[g][i]
        table[g, i] = np.nan if value is None else value
    if np.isinf(table).any():
        raise UserError("a reward is infinite; give finite numbers, or None to leave one out")
    if not ((~np.isnan(table) & (lengths > 0)).sum(axis=-1) >= 2).any():
        raise UserError("no group has two completions with a reward; GVPO compares at least two")
    return make_batch(prompts, tokens, lengths, table)


def pad_groups(batch: Batch, groups: int) -> Batch:
    """Fill up to `groups` groups with invalid copies of the first one: they count for nothing."""
    missing = groups - batch.prompts.shape[0]
    if missing <= 0:
        return batch
    filled = Batch(*(np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in batch))
    return filled._replace(
        valid=np.concatenate([batch.valid, np.zeros_like(filled.valid[:missing])])
    )


def split_groups(batch: Batch, parts: int) -> Batch:
    """`[g, ...] -> [parts, g / parts, ...]`, dealt out in turn, so that sharded groups stay put."""

    def split(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return Batch(*(split(x) for x in batch))
