"""One attention for prefill, decoding, scoring and training: a shared prefix and an own suffix.

The k completions of a prompt attend to the prompt's keys and values, computed once, and to their
own. Both parts share one softmax: each is exponentiated against the common maximum, and the sums
are merged.
Axes: g groups, k completions, t queries, s suffix keys, p prefix keys, n key-value heads, r query
heads for each n, d.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gvpo_jax.precision import einsum_f32

_MASKED = -1e30  # finite, so that a row without a single key gives no NaN


class Int8(NamedTuple):
    """Keys or values in a quarter of float32's memory: `int8[..., s, d]`, a scale for each vector.

    x = whole * scale, rounded; the largest entry of a vector is 127.
    """

    whole: jax.Array
    scale: jax.Array  # [..., s]


Stored = jax.Array | Int8


class Prefix(NamedTuple):
    """Keys and values of the group's prompt, `[g, n, p, d]`, and which of them count, `[g, p]`."""

    keys: Stored
    values: Stored
    mask: jax.Array


def stored(x: Stored, dtype: Any) -> Stored:
    """Keys or values as a cache keeps them: in a floating dtype, or as `Int8`."""
    if isinstance(x, Int8):
        return x
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-30) / 127
    return Int8(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


def attend(
    queries_gkthd: jax.Array,
    keys_gknsd: Stored,
    values_gknsd: Stored,
    mask_gkts: jax.Array,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Softmax attention over the shared prefix and the own suffix together, `[g, k, t, h, d]`.

    Scores and softmax are float32. Query head h of the n * r reads key-value head h // r.

    Args:
        queries_gkthd: `[g, k, t, h, d]`.
        keys_gknsd: `[g, k, n, s, d]`, the suffix's keys; values_gknsd alike.
        mask_gkts: booleans broadcastable to `[g, k, t, s]`: which suffix keys a query sees.
        prefix: the prompt, seen by every query of the group, or None.
    """
    g, k, t, h, d = queries_gkthd.shape
    n = jax.tree.leaves(keys_gknsd)[0].shape[2]
    queries = (queries_gkthd * d**-0.5).reshape(g, k, t, n, h // n, d)
    own = _scores("gktnrd,gknsd->gknrts", queries, keys_gknsd)
    own = jnp.where(mask_gkts[:, :, None, None], own, _MASKED)
    peak = jnp.max(own, axis=-1, keepdims=True)
    if prefix is not None:
        shared = _scores("gktnrd,gnpd->gknrtp", queries, prefix.keys)
        shared = jnp.where(prefix.mask[:, None, None, None, None], shared, _MASKED)
        peak = jnp.maximum(peak, jnp.max(shared, axis=-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    own = jnp.exp(own - peak)
    total = jnp.sum(own, axis=-1)
    dtype = queries_gkthd.dtype
    out = _weighted("gknrts,gknsd->gktnrd", own, values_gknsd, dtype)
    if prefix is not None:
        shared = jnp.exp(shared - peak)
        total = total + jnp.sum(shared, axis=-1)
        out = out + _weighted("gknrtp,gnpd->gktnrd", shared, prefix.values, dtype)
    total_gktnr1 = jnp.moveaxis(total, -1, 2)[..., None]
    return (out / total_gktnr1).astype(dtype).reshape(g, k, t, h, d)


def causal(
    queries_gkthd: jax.Array,
    keys_gknsd: jax.Array,
    values_gknsd: jax.Array,
    prefix: Prefix | None = None,
) -> jax.Array:
    """`attend` where each query sees the prefix, the suffix up to its own place, and no further."""
    t = queries_gkthd.shape[2]
    mask_gkts = jnp.tril(jnp.ones((t, t), bool))[None, None]
    return attend(queries_gkthd, keys_gknsd, values_gknsd, mask_gkts, prefix)


def _scores(spec: str, queries, keys: Stored):
    if not isinstance(keys, Int8):
        return einsum_f32(spec, queries, keys.astype(queries.dtype))
    scores = einsum_f32(spec, queries, keys.whole.astype(queries.dtype))
    return scores * _like_scores(keys.scale)


def _weighted(spec: str, weights, values: Stored, dtype):
    if not isinstance(values, Int8):
        return einsum_f32(spec, weights.astype(dtype), values.astype(dtype))
    weights = weights * _like_scores(values.scale)
    return einsum_f32(spec, weights.astype(dtype), values.whole.astype(dtype))


def _like_scores(scale):
    """`[g, k, n, s]` or, of a prefix, `[g, n, p]`, against `[g, k, n, r, t, s]`."""
    return (scale if scale.ndim == 4 else scale[:, None])[:, :, :, None, None]
