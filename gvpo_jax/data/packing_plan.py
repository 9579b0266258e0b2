"""How a batch is computed: which groups together, and how many tokens of them without padding."""

from typing import NamedTuple

import numpy as np

from gvpo_jax.data.batch import Batch
from gvpo_jax.parallel.distributed import gather

_STEP = 2**0.25  # from one packed size to the next
_TINY, _STEP_OF_TINY = 512, 2.0  # among few places, where padding costs less than compiling


class Plan(NamedTuple):
    """How the groups of a batch are computed."""

    rows: np.ndarray  # [parts, g/parts], the groups of each part, row by row of packed tokens
    packed_size: int | None  # places in a row of packed tokens; None: padded
    padding: float  # share of the computed tokens that are none, over all processes


def make_plan(batch: Batch, *, parts: int = 1, completion_parts: int = 1, shards: int) -> Plan:
    """Deals the groups out so that all parts have about as many tokens; all processes ask at once.

    Args:
        batch: on the host; `g` groups.
        parts: that the groups are cut into.
        completion_parts: that the completions of each group are cut into.
        shards: that each part is cut into, over devices; 0: not by groups, which is then padded.
    """
    g, k = batch.lengths.shape
    k_part, bins = -(-k // completion_parts), parts * shards
    width = batch.prompts.shape[1] + k_part * (batch.completions.shape[2] - 1)
    fed = np.maximum(batch.lengths - 1, 0)
    tokens = completion_parts * batch.prompt_lengths + fed.sum(axis=1)
    rows, most = np.arange(g).reshape(-1, parts if g % parts == 0 else 1).T, 0
    packed = bins > 0 and g % bins == 0 and batch.completions.shape[2] > 1
    if packed:
        dealt = deal(tokens, bins)
        rows = dealt.reshape(shards, parts, -1).swapaxes(0, 1).reshape(parts, -1)
        fed = np.pad(fed, ((0, 0), (0, k_part * completion_parts - k)))
        of_parts = batch.prompt_lengths[:, None] + fed.reshape(g, k_part, -1).sum(axis=1)
        most = of_parts[dealt].sum(axis=1).max()
    everywhere = gather(np.array([[most, tokens.sum()]]))
    longest = int(everywhere[:, 0].max())
    size = packed_size(longest, g // bins * width, rows=shards) if packed else None
    computed = completion_parts * (g * width if size is None else bins * size) * len(everywhere)
    return Plan(rows, size, 1 - float(everywhere[:, 1].sum()) / computed)


def packed_size(tokens: int, full: int, *, rows: int = 1) -> int | None:
    """Places to compute for so many tokens; None: no fewer than the `full` ones with padding.

    Sizes lie a factor 2 ** (1/4) apart, so a run meets few, and a twelfth is empty on average; a
    factor 2 where the `rows` have 512 places or fewer.
    """
    size = full
    while True:
        step = _STEP if size * rows > _TINY else _STEP_OF_TINY
        smaller = min(-(-int(size / step) // 8), (size - 1) // 8) * 8
        if smaller < max(tokens, 1):
            return size if size < full else None
        size = smaller


def deal(tokens: np.ndarray, bins: int) -> np.ndarray:
    """Deals groups out to bins, as many groups and about as many tokens to each: `[bins, g/bins]`.

    The longest first, each to the bin with the fewest tokens that has room.
    """
    room = len(tokens) // bins
    dealt: list[list[int]] = [[] for _ in range(bins)]
    held = np.zeros(bins)
    for number in np.argsort(-tokens, kind="stable"):
        lightest = int(np.argmin(held))
        dealt[lightest].append(int(number))
        held[lightest] += tokens[number]
        if len(dealt[lightest]) == room:
            held[lightest] = np.inf
    return np.array(dealt)
