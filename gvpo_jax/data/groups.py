"""Completions on the host, group by group, each with where it came from: what fills a `Batch`."""

import enum
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gvpo_jax.data.batch import Batch, bucket, pad_prompts, padded, part_of_longest
from gvpo_jax.data.reward_values import FLOAT32_MAX, as_number
from gvpo_jax.errors import NotFinite, UserError
from gvpo_jax.parallel.distributed import max_over_hosts

UNKNOWN = -1  # a policy version or a reference that nobody noted


class Source(enum.IntEnum):
    """Where a completion came from."""

    POLICY = 0  # sampled by the policy for this update
    REPLAY = 1  # sampled by the policy for an earlier one
    DEMONSTRATION = 2  # given with the prompt
    FILE = 3  # sampled elsewhere, read from a file or handed over as text


class Groups(NamedTuple):
    """k completions of each of g prompts, as NumPy arrays; smaller groups are filled up."""

    row: np.ndarray  # [g] the prompts' places among the rows of data
    prompts: np.ndarray  # [g, p] token ids, padded on the right
    prompt_lengths: np.ndarray  # [g] tokens
    completions: np.ndarray  # [g, k, t] token ids, padded on the right
    lengths: np.ndarray  # [g, k] tokens of each completion, the end token included; 0: none there
    stopped: np.ndarray  # [g, k] booleans: it ended by itself, and was not cut off
    rewards: np.ndarray  # [g, k], NaN where a completion has none
    source: np.ndarray  # [g, k] values of `Source`
    version: np.ndarray  # [g, k] updates that the policy had seen when it sampled, or `UNKNOWN`
    # [g, k, t] token log-probs in nats under the policy that sampled, at temperature 1 and before
    # any truncation; NaN where unknown
    old_logps: np.ndarray
    ref_logps: np.ndarray  # [g, k, t] token log-probs in nats under the reference
    reference: np.ndarray  # [g] fingerprint of that reference, or `UNKNOWN` where there are none


_PER_TOKEN = ("completions", "old_logps", "ref_logps")
_PER_COMPLETION = ("lengths", "stopped", "rewards", "source", "version", *_PER_TOKEN)


def make_groups(
    prompts: Sequence[Sequence[int]],
    completions: np.ndarray,
    lengths: np.ndarray,
    *,
    source: Source,
    stopped: np.ndarray | bool = True,
    old_logps: np.ndarray | float = np.nan,
) -> Groups:
    """Groups of g tokenised prompts and arrays `[g, k, t]`, `[g, k]`; the rest is unknown."""
    g, k, t = completions.shape
    return Groups(
        row=np.arange(g),
        prompts=padded(prompts),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        completions=np.asarray(completions, np.int32),
        lengths=np.asarray(lengths, np.int32),
        stopped=np.full((g, k), stopped),
        rewards=np.full((g, k), np.nan, np.float32),
        source=np.full((g, k), source, np.int32),
        version=np.full((g, k), UNKNOWN, np.int32),
        old_logps=np.full((g, k, t), old_logps, np.float32),
        ref_logps=np.zeros((g, k, t), np.float32),
        reference=np.full(g, UNKNOWN, np.int64),
    )


def make_group(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float | None],
    *,
    source: Source,
    row: int = 0,
) -> Groups:
    """A single group from lists: token ids of each completion, and its reward (None: none)."""
    lengths = np.array([[len(ids) for ids in completions]])
    group = make_groups([prompt], padded(completions)[None], lengths, source=source)
    given = np.array([rewards], np.float32)  # makes NaN of None
    return group._replace(row=np.array([row]), rewards=given)


def read_number(value: Any) -> float | None:
    """A reward as it was written: a number, a boolean or a text that says a number; None: none.

    Raises:
        UserError: something else.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # NumPy's, jax's or PyTorch's
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str) else as_number(value)
    except ValueError:
        number = None
    if number is None:
        raise UserError(f"a reward is a number, got {str(value)[:80]!r}")
    return number


def read_reward(value: Any) -> float | None:
    """A reward as it will be stored: a float32, None where there is none (None or NaN).

    Raises:
        UserError: no number, see `read_number`, or an infinite one.
    """
    reward = read_number(value)
    if reward is None or np.isnan(reward):
        return None
    if abs(reward) > FLOAT32_MAX:
        raise UserError(
            f"its reward is infinite, at least in float32: {str(value)[:20]}; give a smaller "
            "number, or None to leave it out"
        )
    return reward


def length_problem(ids: Sequence[int], max_completion_length: int) -> str | None:
    """Why a completion's tokens can't be trained on, or None."""
    if len(ids) == 0:
        return "it has no token, not even an end token"
    if len(ids) > max_completion_length:
        return (
            f"{len(ids)} tokens; raise rollout.max_completion_length, now {max_completion_length}"
        )
    return None


def check_logps(logps: np.ndarray, whose: str) -> None:
    """Raise NotFinite where log-probs are NaN, as they are where weights or logits are."""
    if np.isnan(logps).any():
        raise NotFinite(
            f"NaN among the logits of {whose}: its weights are not finite; lower "
            "optimizer.learning_rate if training made them so, else load whole ones"
        )


def cache_key(reference: int, group: Groups) -> int:
    """Tells reference log-probs of a single group's very tokens from others; `UNKNOWN` stays."""
    if reference == UNKNOWN:
        return UNKNOWN
    prompt = token_lists(group.prompts, group.prompt_lengths)
    content = [int(reference), *prompt, *token_lists(group.completions, group.lengths)]
    return zlib.crc32(repr(content).encode())


def token_lists(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """The lists that lie padded in `tokens`, `[..., t]`: one for each of `lengths`, `[...]`."""
    rows = zip(tokens.reshape(-1, tokens.shape[-1]), lengths.ravel(), strict=True)
    return [row[:n].tolist() for row, n in rows]


def to_batch(
    groups: Groups,
    *,
    longest_prompt: int | None = None,
    longest_completion: int | None = None,
    k: int = 0,
) -> Batch:
    """The batch that holds these groups, one at least, of widths that all processes take.

    Args:
        groups: this process's.
        longest_prompt: see `pad_prompts`.
        longest_completion: likewise of completions, see `part_of_longest`; None: a bucket.
        k: completions of the largest group there will be; default: of the largest here.
    """
    unpadded = token_lists(groups.prompts, groups.prompt_lengths)
    prompts, prompt_lengths = pad_prompts(unpadded, longest_prompt)
    k = max_over_hosts(max(k, groups.lengths.shape[1]))
    longest = max_over_hosts(int(groups.lengths.max(initial=0)))
    t = bucket(longest)
    if longest_completion is not None:
        t = max(min(part_of_longest(longest, longest_completion), longest_completion), longest)
    wide = _widened(groups, k, t)._replace(prompts=prompts, prompt_lengths=prompt_lengths)
    valid = ~np.isnan(wide.rewards) & (wide.lengths > 0)
    wide = wide._replace(rewards=np.where(valid, wide.rewards, 0))
    shared = {name: getattr(wide, name) for name in Batch._fields if name != "valid"}
    return Batch(valid=valid, **shared)


def with_reference(groups: Groups, ref_logps: np.ndarray, reference: int) -> Groups:
    """The groups with the reference's log-probs out of their batch, `[>= g, k, t]`."""
    logps = widen(ref_logps, *groups.ref_logps.shape)
    return groups._replace(ref_logps=logps, reference=np.full_like(groups.reference, reference))


def take(groups: Groups, which: Any) -> Groups:
    """Some of the groups: a slice, or an array of their numbers."""
    return Groups(*(x[which] for x in groups))


def pick(group: Groups, places: Sequence[int] | np.ndarray) -> Groups:
    """The groups with only the completions at these places."""
    return group._replace(**{name: getattr(group, name)[:, places] for name in _PER_COMPLETION})


def trim(groups: Groups) -> Groups:
    """In copies without the padding that neither prompts nor completions need."""
    p, t = int(groups.prompt_lengths.max(initial=0)), int(groups.lengths.max(initial=0))
    shorter = {name: getattr(groups, name)[:, :, :t].copy() for name in _PER_TOKEN}
    return groups._replace(prompts=groups.prompts[:, :p].copy(), **shorter)


def join(a: Groups, b: Groups) -> Groups:
    """Completions of the same prompts side by side; reference log-probs stay if of one kind."""
    t = max(a.completions.shape[2], b.completions.shape[2])
    wide = [_widened(x, x.lengths.shape[1], t) for x in (a, b)]
    both = {
        name: np.concatenate([getattr(x, name) for x in wide], axis=1) for name in _PER_COMPLETION
    }
    return a._replace(**both, reference=np.where(a.reference == b.reference, a.reference, UNKNOWN))


def stack(parts: Sequence[Groups]) -> Groups:
    """Groups one after the other."""
    _, k, t = np.max([x.completions.shape for x in parts], axis=0)
    p = max(x.prompts.shape[1] for x in parts)
    wide = [_widened(x, k, t)._replace(prompts=widen(x.prompts, len(x.row), p)) for x in parts]
    return Groups(*map(np.concatenate, zip(*wide, strict=True)))


def _widened(groups: Groups, k: int, t: int) -> Groups:
    """Cut, or filled up with zeros, to k completions of t tokens."""
    size = len(groups.row), k, t
    return groups._replace(
        **{name: widen(getattr(groups, name), *size) for name in _PER_COMPLETION}
    )


def widen(x: np.ndarray, *shape: int) -> np.ndarray:
    """The array cut and filled up with zeros to a shape, of which it may lack the last axes."""
    out = np.zeros(shape[: x.ndim], x.dtype)
    inside = tuple(slice(min(sizes)) for sizes in zip(x.shape, out.shape, strict=True))
    out[inside] = x[inside]
    return out
