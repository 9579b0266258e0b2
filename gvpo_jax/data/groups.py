"""Completions on the host, group by group, each with where it came from: what fills a `Batch`."""

import enum
import zlib
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from gvpo_jax.data.batch import Batch, bucket, pad_prompts, part_of_longest
from gvpo_jax.errors import UserError

UNKNOWN = -1  # a policy version or a reference that nobody noted


class Source(enum.IntEnum):
    """Where a completion came from."""

    POLICY = 0  # sampled by the policy for this update
    REPLAY = 1  # sampled by the policy for an earlier one
    DEMONSTRATION = 2  # given with the prompt
    FILE = 3  # sampled elsewhere, read from a file or handed over as text


class Group(NamedTuple):
    """k completions of one prompt, as NumPy arrays.

    Attributes:
        row: the prompt's place among the rows of data.
        prompt: `[p]` token ids.
        completions: `[k, t]` token ids, padded on the right.
        lengths: `[k]` tokens of each completion, the end token included; 0: none there.
        rewards: `[k]`, NaN where a completion has none.
        source: `[k]` values of `Source`.
        version: `[k]` updates that the policy had seen when it sampled, or `UNKNOWN`.
        old_logps: `[k, t]` token log-probs under the policy that sampled, NaN where unknown.
        ref_logps: `[k, t]` token log-probs under the reference.
        reference: fingerprint of that reference, or `UNKNOWN` where there are none.
    """

    row: int
    prompt: np.ndarray
    completions: np.ndarray
    lengths: np.ndarray
    rewards: np.ndarray
    source: np.ndarray
    version: np.ndarray
    old_logps: np.ndarray
    ref_logps: np.ndarray
    reference: int = UNKNOWN


def make_group(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float | None],
    *,
    source: Source,
    row: int = 0,
    version: int = UNKNOWN,
) -> Group:
    """A group from lists: token ids of each completion, and its reward (None: none)."""
    k, t = len(completions), max((len(ids) for ids in completions), default=0)
    tokens = np.zeros((k, t), np.int32)
    for place, ids in zip(tokens, completions, strict=True):
        place[: len(ids)] = ids
    return Group(
        row=row,
        prompt=np.asarray(prompt, np.int32),
        completions=tokens,
        lengths=np.array([len(ids) for ids in completions], np.int32),
        rewards=np.array([np.nan if r is None else r for r in rewards], np.float32),
        source=np.full(k, source, np.int32),
        version=np.full(k, version, np.int32),
        old_logps=np.full((k, t), np.nan, np.float32),
        ref_logps=np.zeros((k, t), np.float32),
    )


def read_reward(value: Any) -> float | None:
    """A reward as it will be stored: a float32, None where there is none (None or NaN).

    Raises:
        UserError: no number, or an infinite one.
    """
    if value is None:
        return None
    if not isinstance(value, Real):
        raise UserError(f"a reward is a number, got {value!r}")
    try:
        reward = float(value)
    except OverflowError:
        reward = float("inf")
    if abs(reward) > float(np.finfo(np.float32).max):
        raise UserError(
            f"its reward is infinite, at least in float32: {str(value)[:20]}; give a smaller "
            "number, or None to leave it out"
        )
    return None if np.isnan(reward) else reward


def length_problem(ids: Sequence[int], max_completion_length: int) -> str | None:
    """Why a completion's tokens can't be trained on, or None."""
    if len(ids) == 0:
        return "it has no token, not even an end token"
    if len(ids) > max_completion_length:
        return (
            f"{len(ids)} tokens; raise rollout.max_completion_length, now {max_completion_length}"
        )
    return None


def cache_key(reference: int, group: Group) -> int:
    """Tells reference log-probs of this group's very tokens from others; `UNKNOWN` for UNKNOWN."""
    if reference == UNKNOWN:
        return UNKNOWN
    content = [reference, group.prompt.tolist(), *(ids for ids in token_lists(group))]
    return zlib.crc32(repr(content).encode())


def token_lists(group: Any) -> list[list[int]]:
    """The token ids of every completion of a group or a rollout, without padding."""
    t = group.completions.shape[-1]
    rows = zip(group.completions.reshape(-1, t), group.lengths.ravel(), strict=True)
    return [row[:n].tolist() for row, n in rows]


def make_batch(
    groups: Sequence[Group],
    *,
    longest_prompt: int | None = None,
    longest_completion: int | None = None,
    k: int | None = None,
    agree: Callable[[int], int] = int,
) -> Batch:
    """The batch that holds these groups, of whatever sizes.

    Args:
        groups: at least one.
        longest_prompt: see `pad_prompts`.
        longest_completion: tokens of the longest completion there will be in the run, where it is
            known, see `gvpo_jax.data.batch.part_of_longest`; else the width is a bucket.
        k: completions of the largest group there will be; default: of the largest here.
        agree: a size needed here -> the one that all processes take.
    """
    prompts, prompt_lengths = pad_prompts(
        [g.prompt.tolist() for g in groups], longest_prompt, agree
    )
    k = agree(max(k or 0, *(len(g.lengths) for g in groups)))
    longest = agree(max(int(g.lengths.max(initial=0)) for g in groups))
    t = bucket(longest)
    if longest_completion is not None:
        t = max(min(part_of_longest(longest, longest_completion), longest_completion), longest)
    lengths = np.stack([_widen(g.lengths, k) for g in groups])
    rewards = np.stack([_widen(g.rewards, k) for g in groups])
    valid = ~np.isnan(rewards) & (lengths > 0)
    return Batch(
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        completions=np.stack([_widen(g.completions, k, t) for g in groups]),
        lengths=lengths,
        rewards=np.where(valid, rewards, 0),
        valid=valid,
        ref_logps=np.stack([_widen(g.ref_logps, k, t) for g in groups]),
        old_logps=np.stack([_widen(g.old_logps, k, t) for g in groups]),
        source=np.stack([_widen(g.source, k) for g in groups]),
        version=np.stack([_widen(g.version, k) for g in groups]),
    )


def cut(batch: Batch, number: int, group: Group, reference: int) -> Group:
    """Group `number` of a batch made of groups, now with the reference log-probs in the batch."""
    k, t = group.completions.shape
    ref_logps = _widen(np.asarray(batch.ref_logps[number]), k, t)
    return group._replace(ref_logps=ref_logps, reference=reference)


def take(group: Group, places: Sequence[int] | np.ndarray) -> Group:
    """The group with only the completions at these places."""
    return group._replace(
        **{name: getattr(group, name)[places] for name in _DTYPES if name != "prompt"}
    )


def join(a: Group, b: Group) -> Group:
    """Both groups' completions side by side; reference log-probs stay if they are of one kind."""
    t = max(a.completions.shape[1], b.completions.shape[1])

    def both(name: str, *width: int) -> np.ndarray:
        x, y = getattr(a, name), getattr(b, name)
        return np.concatenate([_widen(v, len(v), *width) for v in (x, y)])

    wide = {name: both(name, t) for name in ("completions", "old_logps", "ref_logps")}
    narrow = {name: both(name) for name in ("lengths", "rewards", "source", "version")}
    reference = a.reference if a.reference == b.reference else UNKNOWN
    return a._replace(**wide, **narrow, reference=reference)


def pack(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Groups as a few flat arrays, to be saved."""
    shapes = [(len(g.prompt), *g.completions.shape) for g in groups]
    packed = {
        "row": np.array([g.row for g in groups], np.int64),
        "reference": np.array([g.reference for g in groups], np.int64),
        "shape": np.array(shapes, np.int64).reshape(len(groups), 3),
    }
    for name, dtype in _DTYPES.items():
        parts = [getattr(g, name).ravel() for g in groups]
        packed[name] = np.concatenate(parts or [np.zeros(0)]).astype(dtype)
    return packed


def unpack(packed: dict[str, np.ndarray]) -> list[Group]:
    """The groups that `pack` was given."""
    at = dict.fromkeys(_DTYPES, 0)
    groups = []
    for row, reference, (p, k, t) in zip(
        packed["row"], packed["reference"], packed["shape"], strict=True
    ):
        fields = {}
        for name in _DTYPES:
            shape = (p,) if name == "prompt" else (k, t) if name in _PER_TOKEN else (k,)
            size = int(np.prod(shape))
            part = packed[name][at[name] : at[name] + size]
            fields[name] = part.reshape(shape).copy()  # a view would keep all of them alive
            at[name] += size
        groups.append(Group(row=int(row), reference=int(reference), **fields))
    return groups


_PER_TOKEN = ("completions", "old_logps", "ref_logps")
_DTYPES = {
    "prompt": np.int32,
    "completions": np.int32,
    "lengths": np.int32,
    "rewards": np.float32,
    "source": np.int32,
    "version": np.int32,
    "old_logps": np.float32,
    "ref_logps": np.float32,
}


def _widen(x: np.ndarray, *shape: int) -> np.ndarray:
    """The array cut and filled up with zeros to a shape, along its first axes."""
    out = np.zeros((*shape, *x.shape[len(shape) :]), x.dtype)
    inside = tuple(slice(0, min(a, b)) for a, b in zip(x.shape, shape, strict=False))
    out[inside] = x[inside]
    return out
