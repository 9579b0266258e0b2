"""One attention for prefill, decoding, scoring and training: a shared prefix and an own suffix.

The k completions of a prompt attend to the prompt's keys and values, computed once, and to their
own. Both parts share one softmax: each is exponentiated against the common maximum, and the sums
are merged.
Axes: g groups, k completions, t queries, s suffix keys, p prefix keys, n key-value heads, r query
heads for each n, d.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gvpo_jax.precision import einsum_f32

_MASKED = -1e30  # finite, so that a row without a single key gives no NaN


class Prefix(NamedTuple):
    """Keys and values of the group's prompt, `[g, n, p, d]`, and which of them count, `[g, p]`."""

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


def attend(
    queries_gkthd: jax.Array,
    keys_gknsd: jax.Array,
    values_gknsd: jax.Array,
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
    n = keys_gknsd.shape[2]
    queries = (queries_gkthd * d**-0.5).reshape(g, k, t, n, h // n, d)
    own = einsum_f32("gktnrd,gknsd->gknrts", queries, keys_gknsd)
    own = jnp.where(mask_gkts[:, :, None, None], own, _MASKED)
    peak = jnp.max(own, axis=-1, keepdims=True)
    if prefix is not None:
        shared = einsum_f32("gktnrd,gnpd->gknrtp", queries, prefix.keys)
        shared = jnp.where(prefix.mask[:, None, None, None, None], shared, _MASKED)
        peak = jnp.maximum(peak, jnp.max(shared, axis=-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    own = jnp.exp(own - peak)
    total = jnp.sum(own, axis=-1)
    out = einsum_f32("gknrts,gknsd->gktnrd", own.astype(values_gknsd.dtype), values_gknsd)
    if prefix is not None:
        shared = jnp.exp(shared - peak)
        total = total + jnp.sum(shared, axis=-1)
        weights = shared.astype(prefix.values.dtype)
        out = out + einsum_f32("gknrtp,gnpd->gktnrd", weights, prefix.values)
    total_gktnr1 = jnp.moveaxis(total, -1, 2)[..., None]
    return (out / total_gktnr1).astype(queries_gkthd.dtype).reshape(g, k, t, h, d)


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
