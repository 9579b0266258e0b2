"""One batch of groups: what rollout, rewards and scoring fill in and the train step reads."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.parallel.distributed import max_over_hosts

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """g groups of k completions. Masks come from lengths and `valid`, never from token values."""

    prompts: Array  # [g, p] int32, padded on the right
    prompt_lengths: Array  # [g] int32, at least 1
    completions: Array  # [g, k, t] int32, padded on the right
    lengths: Array  # [g, k] int32, the end token included
    rewards: Array  # [g, k] float32; what stands at an invalid completion does not matter
    valid: Array  # [g, k] booleans: completions that have a reward
    ref_logps: Array  # [g, k, t] float32 token log-probs under the reference, in nats
    # [g, k, t] float32 token log-probs under the policy that sampled, NaN where unknown. GVPO does
    # not look at them.
    old_logps: Array
    source: Array  # [g, k] int32 where the completion came from: `gvpo_jax.data.groups.Source`
    version: Array  # [g, k] int32 updates that the policy had seen when it sampled; -1: unknown


def pad_prompts(
    prompts: Sequence[Sequence[int]], longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad to a width that all processes take: token ids `[g, p]` and lengths `[g]`, int32.

    longest: length of the longest prompt there will be in the run, where it is known. Then the
        buckets are that length, its half and its quarter: three widths to compile at most.

    Raises:
        ValueError: no prompt, or one without a token.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError("every prompt needs at least one token: give it some text")
    width = int(lengths.max())
    width = max_over_hosts(bucket(width) if longest is None else part_of_longest(width, longest))
    return padded(prompts, width), lengths


def padded(rows: Sequence[Sequence[float]], width: int = 0, dtype: type = np.int32) -> np.ndarray:
    """`[rows, width]`, filled up with zeros on the right; at least as wide as the longest row."""
    out = np.zeros((len(rows), max([width, *map(len, rows)])), dtype)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out


def bucket(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, 96, ... whichever is the first that fits."""
    sizes = (size << doubled for doubled in itertools.count() for size in (16, 24))
    return next(size for size in sizes if size >= length)


def part_of_longest(length: int, longest: int) -> int:
    """The padded length where the longest in the run is known: that, its half or its quarter."""
    sizes = (-(-longest // (parts * 8)) * 8 for parts in (4, 2, 1))  # multiples of 8
    return next((size for size in sizes if size >= length), bucket(length))


def pad_groups(batch: Batch, groups: int) -> Batch:
    """Fill up to `groups` groups with empty copies of the first one: they count for nothing."""
    missing = groups - batch.prompts.shape[0]
    if missing <= 0:
        return batch
    filled = Batch(*(np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in batch))
    filled.valid[-missing:] = False
    filled.lengths[-missing:] = 0
    filled.prompt_lengths[-missing:] = 1
    return filled


def fill_up(batch: Batch, *, groups: int, completions: int) -> Batch:
    """The batch, while tracing, with invalid groups and completions up to multiples of these."""
    g, k = batch.valid.shape
    missing_g, missing_k = -g % groups, -k % completions
    if not missing_g and not missing_k:
        return batch

    def fill(name, x):
        missing = (missing_g,) if name in ("prompts", "prompt_lengths") else (missing_g, missing_k)
        return jnp.pad(x, [*((0, n) for n in missing), *[(0, 0)] * (x.ndim - len(missing))])

    filled = Batch(*map(fill, Batch._fields, batch))
    return filled._replace(prompt_lengths=jnp.maximum(filled.prompt_lengths, 1))


def split_completions(x: jax.Array, parts: int) -> jax.Array:
    """`[g, k, ...] -> [parts, g, k / parts, ...]`, dealt out in turn, so that sharded ones stay."""
    g, k, *rest = x.shape
    return jnp.moveaxis(x.reshape(g, k // parts, parts, *rest), 2, 0)


def join_completions(x: jax.Array) -> jax.Array:
    """`[parts, g, k / parts, ...] -> [g, k, ...]`, the inverse of `split_completions`."""
    parts, g, k, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(g, k * parts, *rest)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch: groups of k completions; prompts of p and completions of t tokens."""

    groups: int
    k: int
    p: int
    t: int
