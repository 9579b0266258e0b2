"""Log-probabilities of tokens from hidden states, without ever holding logits of every position."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gvpo_jax.precision import einsum_f32

__all__ = [
    "completion_mask",
    "sequence_logprobs",
    "token_logprobs",
]

CHUNK_BYTES = 2**29
_LANES = 128  # rows of the head that a block is a multiple of


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    where: jax.Array | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    kept_bytes: int = 0,
    vocabulary_blocks: bool = False,
    cap: float | None = None,
) -> jax.Array:
    """Log softmax(hidden @ head.T)[target] for every position, exact, in float32.

    Positions are worked off in chunks of the T axis. The logits of a single chunk are kept for the
    backward pass, those of several are computed again: beyond `chunk_bytes`, the memory that logits
    take grows neither with T nor with V. The leading axes stay whole, so that a batch sharded over
    devices stays where it is. Reverse-mode derivatives only.

    With `vocabulary_blocks` it is the head that is cut: all positions, and so many of its rows at
    once. Its gradient is then written once, and not added to for each chunk: faster on TPUs.

    Args:
        hidden: `[..., T, D]` final hidden states, each the one that predicts its target.
        head: `[V, D]` output embedding.
        targets: `[..., T]` token ids in [0, V).
        where: `[..., T]` booleans, positions that are asked for: what the others get means nothing,
            and chunks of positions after the last of them are not computed. Hidden states are
            finite all the same. Default: all.
        chunk_bytes: what the float32 logits of a chunk may take, on all devices together; a chunk
            has one position of each row at least, and a block 128 rows of the head.
        kept_bytes: what they may take where one chunk is all, if that is more.
        vocabulary_blocks: whether the head is cut, into blocks of half as many logits as a chunk.
            Where two chunks of positions are enough, these are.
        cap: of the logits, c * tanh(logits / c); None: as they are.

    Returns:
        `[..., T]` float32, in nats.

    Raises:
        ValueError: shapes do not fit together.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != head.shape[-1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape} and targets {targets.shape} must be "
            "[..., T, D], [V, D] and [..., T]"
        )
    t = targets.shape[-1]
    logits_bytes = max(targets.size * len(head) * 4, 1)
    if vocabulary_blocks and logits_bytes > max(kept_bytes, 2 * chunk_bytes):
        rows = chunk_bytes // 2 * len(head) // logits_bytes // _LANES * _LANES
        width = min(max(rows, _LANES), len(head))
        return _in_blocks(hidden, head, targets, width, cap)
    most = t if logits_bytes <= kept_bytes else max(chunk_bytes * t // logits_bytes, 1)
    width = max(-(-t // max(-(-t // most), 1)), 1)  # chunks of about one length
    split = functools.partial(_split, axis=targets.ndim - 1, width=width)
    wanted = None if where is None else split(jnp.broadcast_to(where, targets.shape))
    logps: Any = _in_chunks(split(hidden), head, split(targets), wanted, cap)
    return jnp.moveaxis(logps, 0, -2).reshape(*targets.shape[:-1], -1)[..., :t]


def sequence_logprobs(token_logps: jax.Array, lengths: ArrayLike) -> jax.Array:
    """Sum of the first `lengths` token log-probs: `[..., T], [...] -> [...]`, float32, in nats."""
    mask = completion_mask(lengths, token_logps.shape[-1])
    return jnp.sum(jnp.where(mask, token_logps.astype(jnp.float32), 0), axis=-1)


def completion_mask(lengths: ArrayLike, max_length: int) -> jax.Array:
    """Which positions lie in the completion, from lengths alone: `[...] -> [..., T]` booleans."""
    lengths = jnp.asarray(lengths)
    places = jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape, max_length), lengths.ndim)
    return places < lengths[..., None]


def _split(x, axis, width):
    """[..., T, ...] -> [n, ..., width, ...], filled up: the chunks in front, ready for scan."""
    x = jnp.pad(x, [(0, -size % width if i == axis else 0) for i, size in enumerate(x.shape)])
    shape = (*x.shape[:axis], x.shape[axis] // width, width, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Scores or logits kept within (-cap, cap): cap * tanh(x / cap); None: as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_chunks(hidden, head, targets, where, cap):
    """Log-probs of all chunks: `[n, ..., w, D]`, `[V, D]`, `[n, ..., w]`, the same -> that."""
    return _forward(hidden, head, targets, where, cap)[0]


def _forward(hidden, head, targets, where, cap):
    table, alone = head.astype(hidden.dtype), len(hidden) == 1

    def chunk(hidden, targets):
        logits = soft_cap(einsum_f32("...d,vd->...v", hidden, table), cap)
        total = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (picked - total, total, logits if alone else None), None

    (logps, total, logits), _ = _work_off(chunk, where, (hidden, targets))
    return logps, (hidden, head, targets, where, total, logits)


def _backward(cap, kept, cotangents):
    hidden, head, targets, where, total, logits = kept
    table = head.astype(hidden.dtype)

    def chunk(hidden, targets, total, cotangent, logits):
        if logits is None:
            logits = soft_cap(einsum_f32("...d,vd->...v", hidden, table), cap)
        d = _d_logits(logits, _ids(0, logits), targets, total, cotangent, cap)
        d = d.astype(hidden.dtype)
        d_hidden = einsum_f32("...v,vd->...d", d, table).astype(hidden.dtype)
        axes = "abcefg"[: targets.ndim]
        return d_hidden, einsum_f32(f"{axes}d,{axes}v->dv", hidden, d)

    chunks = (hidden, targets, total, cotangents, logits)
    d_hidden, d_head_dv = _work_off(chunk, where, chunks)
    return d_hidden, d_head_dv.T.astype(head.dtype), None, None


_in_chunks.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_blocks(hidden, head, targets, width, cap):
    """Log-probs `[...]`, from so many rows of the head at a time."""
    return _forward_blocks(hidden, head, targets, width, cap)[0]


def _forward_blocks(hidden, head, targets, width, cap):
    def add(start, rows, so_far):
        """Of the logits so far: the largest, the sum of exp(logit - largest), the target's."""
        largest, total, picked = so_far
        table = rows.astype(hidden.dtype)
        logits = soft_cap(einsum_f32("...d,vd->...v", hidden, table), cap)
        new = jnp.maximum(largest, jnp.max(logits, axis=-1))
        total = total * jnp.exp(largest - new)
        total += jnp.sum(jnp.exp(logits - new[..., None]), axis=-1)
        is_target = _ids(start, logits) == targets[..., None]
        return new, total, picked + jnp.sum(jnp.where(is_target, logits, 0), axis=-1)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = jnp.full_like(zeros, -jnp.inf), zeros, zeros
    largest, total, picked = _over_blocks(add, head, width, start)
    total = largest + jnp.log(total)
    return picked - total, (hidden, head, targets, total)


def _backward_blocks(width, cap, kept, cotangents):
    hidden, head, targets, total = kept
    axes = "abcefg"[: targets.ndim]

    def add(start, rows, so_far):
        d_hidden, d_head = so_far
        table = rows.astype(hidden.dtype)
        logits = soft_cap(einsum_f32("...d,vd->...v", hidden, table), cap)
        d = _d_logits(logits, _ids(start, logits), targets, total, cotangents, cap)
        d = d.astype(hidden.dtype)
        d_rows = einsum_f32(f"{axes}v,{axes}d->vd", d, hidden)
        d_head = jax.lax.dynamic_update_slice_in_dim(d_head, d_rows, start, axis=0)
        return d_hidden + einsum_f32("...v,vd->...d", d, table), d_head

    # Every row of the second is written once.
    start = jnp.zeros(hidden.shape, jnp.float32), jax.lax.empty(head.shape, jnp.float32)
    d_hidden, d_head = _over_blocks(add, head, width, start)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None


_in_blocks.defvjp(_forward_blocks, _backward_blocks)


def _over_blocks(add, table, width, so_far):
    """`add(first row, rows, so_far)` for all blocks of a table; the last one may be narrower."""
    whole, rest = divmod(len(table), width)

    def step(i, so_far):
        rows = jax.lax.dynamic_slice_in_dim(table, i * width, width)
        return add(i * width, rows, so_far)

    so_far = jax.lax.fori_loop(0, whole, step, so_far)
    return add(whole * width, table[whole * width :], so_far) if rest else so_far


def _ids(start, logits):
    return start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _d_logits(logits, ids, targets, total, cotangents, cap):
    """The gradient of the logits before the cap."""
    d = jnp.where(ids == targets[..., None], 1, 0) - jnp.exp(logits - total[..., None])
    if cap is not None:  # the slope of the cap, from its value
        d = d * (1 - (logits / cap) ** 2)
    return cotangents[..., None] * d


def _work_off(chunk, where, arrays):
    """What `chunk` gives for each chunk: the first part stacked, the second added up.

    All is zero after the last chunk of which `where` asks for something.
    """

    def one(i):
        return chunk(*jax.tree.map(lambda x: x[i], arrays))

    n = len(arrays[0])
    if n == 1:
        stacked, added = one(0)
        return jax.tree.map(lambda x: x[None], stacked), added

    def step(i, so_far):
        stacked, added = so_far
        new, here = one(i)
        stacked = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), stacked, new
        )
        return stacked, jax.tree.map(jnp.add, added, here)

    stacked, added = jax.eval_shape(one, 0)
    stacked = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), stacked)
    start = stacked, jax.tree.map(jnp.zeros_like, added)
    count = n
    if where is not None:
        asked = jnp.any(where, axis=range(1, where.ndim))
        count = jnp.max(jnp.where(asked, jnp.arange(1, n + 1), 0))
    return jax.lax.fori_loop(0, count, step, start)


def __dir__() -> list[str]:
    """Tab completion offers what is for others to use."""
    return __all__
