"""Drawing a token per row from logits: truncation, then the inverse cumulative distribution."""

import jax
import jax.numpy as jnp

from gvpo_jax.rollout.engine import SamplingParams

_BLOCK = 256


def draw(logits_bv: jax.Array, uniforms_b: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Token ids `[b]` from `softmax(logits / temperature)`, truncated; greedy at temperature 0.

    One uniform number per row picks the token whose stretch of the cumulative distribution it falls
    in, which is much cheaper than a Gumbel number for every token of the vocabulary.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    logits = _truncate(logits_bv.astype(jnp.float32) / sampling.temperature, sampling)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return _inverse_cdf(weights, uniforms_b)


def penalize(logits_bv: jax.Array, ids_bn: jax.Array, penalty: float) -> jax.Array:
    """Logits that are lower for the tokens `ids_bn`, as CTRL's repetition penalty makes them.

    ids_bn: any number of times; those that are no token, such as the vocabulary's size, count for
        nothing.
    """
    here_bn = jnp.take_along_axis(logits_bv, jnp.minimum(ids_bn, logits_bv.shape[-1] - 1), axis=1)
    lower_bn = jnp.where(here_bn > 0, here_bn / penalty, here_bn * penalty)
    return jax.vmap(lambda row, ids, lower: row.at[ids].set(lower, mode="drop"))(
        logits_bv, ids_bn, lower_bn
    )


def _truncate(logits, sampling: SamplingParams):
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # a token stays if those above it fall short
        last = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if sampling.min_p > 0:
        peak = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < peak + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _inverse_cdf(weights_bv, uniforms_b):
    """First the block, then the place in it: two short cumulative sums in place of a long one."""
    b, v = weights_bv.shape
    weights = jnp.pad(weights_bv, ((0, 0), (0, -v % _BLOCK))).reshape(b, -1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(weights, axis=-1), axis=-1)
    aim = uniforms_b[:, None] * ends[:, -1:]
    block = _first_above(ends, aim)
    start = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (1, 0))), block, axis=-1)
    inside = jnp.take_along_axis(weights, block[..., None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(inside, axis=-1), aim - start)
    # Rounding can carry the aim past the block's sum: fall back on its last token with any weight.
    last = jnp.max(jnp.where(inside > 0, jnp.arange(_BLOCK)[None], 0), axis=-1, keepdims=True)
    place = jnp.minimum(place, last)
    return (block * _BLOCK + place)[:, 0].astype(jnp.int32)


def _first_above(ends, aim):
    """Index of the first entry greater than `aim`, clipped to the last one, `[b, 1]`."""
    return jnp.minimum(jnp.sum(ends <= aim, axis=-1, keepdims=True), ends.shape[-1] - 1)
