"""Log-probabilities of tokens from hidden states, without ever holding logits of every position."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gvpo_jax.precision import einsum_f32

CHUNK_TOKENS = 1024


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk_tokens: int = CHUNK_TOKENS
) -> jax.Array:
    """log softmax(hidden @ head.T)[target] for every position, exact, in float32.

    Positions are worked off in chunks of the T axis; a chunk's logits are computed again in the
    backward pass instead of being kept, so peak memory follows `chunk_tokens` x V and not T x V.
    The leading axes stay whole, so that a batch sharded over devices stays where it is.

    Args:
        hidden: `[..., T, D]` final hidden states, each the one that predicts its target.
        head: `[V, D]` output embedding.
        targets: `[..., T]` token ids in [0, V).
        chunk_tokens: positions, over all leading axes together, whose logits may exist at once; a
            batch that is cut over devices takes that many times more.

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
    rows = max(targets.size // max(t, 1), 1)
    width = min(max(chunk_tokens // rows, 1), t)
    if width >= t:
        return _chunk_logprobs(hidden, head, targets)
    pad = -t % width
    hidden = jnp.pad(hidden, [(0, 0)] * (hidden.ndim - 2) + [(0, pad), (0, 0)])
    targets = jnp.pad(targets, [(0, 0)] * (targets.ndim - 1) + [(0, pad)])
    chunks = (_split(hidden, -2, width), _split(targets, -1, width))
    chunk = jax.checkpoint(lambda h, y: _chunk_logprobs(h, head, y))
    _, logps = jax.lax.scan(lambda _, hy: (None, chunk(*hy)), None, chunks)
    return jnp.moveaxis(logps, 0, -2).reshape(targets.shape)[..., :t]


def sequence_logprobs(token_logps: jax.Array, lengths: ArrayLike) -> jax.Array:
    """Sum of the first `lengths` token log-probs: `[..., T], [...] -> [...]`, float32, in nats."""
    mask = completion_mask(lengths, token_logps.shape[-1])
    return jnp.sum(jnp.where(mask, token_logps.astype(jnp.float32), 0), axis=-1)


def completion_mask(lengths: ArrayLike, max_length: int) -> jax.Array:
    """Which positions lie in the completion, from lengths alone: `[...] -> [..., T]` booleans."""
    lengths = jnp.expand_dims(lengths, -1)
    return (
        jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape[:-1], max_length), lengths.ndim - 1)
        < lengths
    )


def _chunk_logprobs(hidden, head, targets):
    logits = einsum_f32("...d,vd->...v", hidden, head.astype(hidden.dtype))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _split(x, axis, width):
    """[..., n * width, ...] -> [n, ..., width, ...] with the chunks in front, ready for scan."""
    axis = x.ndim + axis
    shape = (*x.shape[:axis], x.shape[axis] // width, width, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)
