"""One attention for prefill, decoding, scoring and training: a shared prefix and an own suffix.

The k completions of a prompt attend to the prompt's keys and values, computed once, and to their
own. Both parts share one softmax: each is exponentiated against the common maximum, and the sums
are merged.
Axes: g groups, k completions, t queries, s suffix keys, p prefix keys, n key-value heads, r query
heads for each n, d.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvpo_jax.logprobs import soft_cap
from gvpo_jax.parallel.layout import activation_axes
from gvpo_jax.precision import einsum_f32

_MASKED = -1e30  # finite, so that a row without a single key gives no NaN
_BLOCKS, _SMALLEST_BLOCK = 4, 64  # of queries, at most so many and at least so long


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


def stored(x: jax.Array, dtype: Any) -> Stored:
    """Keys or values as a cache keeps them: in a floating dtype, or as `Int8`."""
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
    *,
    shared_mask_gktp: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Softmax attention over the shared prefix and the own suffix together, `[g, k, t, h, d]`.

    Scores and softmax are float32. Query head h of the n * r reads key-value head h // r.

    Args:
        queries_gkthd: `[g, k, t, h, d]`.
        keys_gknsd: `[g, k, n, s, d]`, the suffix's keys.
        values_gknsd: its values, alike.
        mask_gkts: booleans broadcastable to `[g, k, t, s]`: which suffix keys a query sees.
        prefix: the prompt, seen by every query of the group, or None.
        shared_mask_gktp: booleans, which prefix keys a query sees; default: `prefix.mask`.
        cap: of the scores, see `gvpo_jax.logprobs.soft_cap`.
    """
    g, k, t, h, d = queries_gkthd.shape
    n, s = jax.tree.leaves(keys_gknsd)[0].shape[2:4]
    r, dtype = h // n, queries_gkthd.dtype
    # All queries of a key-value head as the rows of one matrix: batches of plain matrix products.
    queries = (queries_gkthd * d**-0.5).reshape(g, k, t, n, r, d)
    queries_gknqd = jnp.moveaxis(queries, 2, 4).reshape(g, k, n, r * t, d)
    some_g, some_k = mask_gkts.shape[:2]
    mask = jnp.broadcast_to(mask_gkts[:, :, None, None], (some_g, some_k, 1, r, t, s))
    own = soft_cap(_scores(queries_gknqd, keys_gknsd), cap)
    own = jnp.where(mask.reshape(some_g, some_k, 1, r * t, s), own, _MASKED)
    peak = jnp.max(own, axis=-1, keepdims=True)
    if prefix is not None:
        shared = soft_cap(_scores(_join(queries_gknqd), prefix.keys), cap)  # [g, n, k * q, p]
        seen = prefix.mask[:, None, None]
        if shared_mask_gktp is not None:
            p = prefix.mask.shape[1]
            mask = jnp.broadcast_to(shared_mask_gktp[:, :, None], (g, k, r, t, p))
            seen = mask.reshape(g, 1, k * r * t, p)
        shared = jnp.where(seen, shared, _MASKED)
        peak = jnp.maximum(peak, _split(jnp.max(shared, axis=-1, keepdims=True), k))
    peak = jax.lax.stop_gradient(peak)
    own = jnp.exp(own - peak)
    total = jnp.sum(own, axis=-1, keepdims=True)
    out = _weighted(own, values_gknsd, dtype)
    if prefix is not None:
        shared = jnp.exp(shared - _join(peak))
        total = total + _split(jnp.sum(shared, axis=-1, keepdims=True), k)
        out = out + _split(_weighted(shared, prefix.values, dtype), k)
    out = (out / total).astype(dtype).reshape(g, k, n, r, t, d)
    return jnp.moveaxis(out, 4, 2).reshape(g, k, t, h, d)


def causal(
    queries_gkthd: jax.Array,
    keys_gknsd: jax.Array,
    values_gknsd: jax.Array,
    prefix: Prefix | None = None,
    *,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """`attend` where each query sees the prefix, the suffix up to its own place, and no further.

    In blocks of queries, so that of the keys that no query of a block sees none is computed.

    window: the positions that a query sees, its own included; None: all.
    cap: see `attend`.
    """
    t = queries_gkthd.shape[2]
    size = max(_SMALLEST_BLOCK, -(-t // _BLOCKS))
    out = []
    for start in range(0, t, size):
        end = min(start + size, t)
        first, shared, shared_mask = 0, prefix, None
        if window is not None:
            first = max(0, start + 1 - window)
            shared = prefix if start + 1 < window else None
            if shared is not None:
                shared_mask = seen_of_prefix(shared, jnp.arange(start, end)[None, None], window)
        mask_ts = jnp.arange(first, end)[None] <= jnp.arange(start, end)[:, None]
        if window is not None:
            mask_ts &= jnp.arange(first, end)[None] > jnp.arange(start, end)[:, None] - window
        queries = queries_gkthd[:, :, start:end]
        keys, values = keys_gknsd[:, :, :, first:end], values_gknsd[:, :, :, first:end]
        own_mask, limits = mask_ts[None, None], {"shared_mask_gktp": shared_mask, "cap": cap}
        out.append(attend(queries, keys, values, own_mask, shared, **limits))
    return jnp.concatenate(out, axis=2)


def seen_of_prefix(prefix: Prefix, places_gkt: jax.Array, window: int) -> jax.Array:
    """Which of the prefix lies within the window of queries at these places behind it.

    `[g, k, t] -> [g, k, t, p]` booleans; axes of length 1 stand for all of g and k.
    """
    counted_gp = prefix.mask
    ages_gp = jnp.sum(counted_gp, axis=1, keepdims=True) - jnp.arange(counted_gp.shape[1])[None]
    within = places_gkt[..., None] + ages_gp[:, None, None] < window
    return counted_gp[:, None, None] & within


def on_each_device(attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An attention like `causal` as a function of a mesh, too, and of its arguments.

    Every device of the mesh runs it on its own groups and heads.
    """

    @functools.wraps(attention)
    def on_mesh(mesh: Mesh, queries_gkthd, keys_gknsd, values_gknsd, prefix=None, **options):
        g, k, _, heads, _ = queries_gkthd.shape
        over_groups, over_k = activation_axes(mesh, g, k)
        tensor = mesh.shape["tensor"]
        over_heads = "tensor" if keys_gknsd.shape[2] % tensor == heads % tensor == 0 else None
        queries, own = P(over_groups, over_k, None, over_heads), P(over_groups, over_k, over_heads)
        shared: Any = P(over_groups, over_heads)
        counted: Any = P(over_groups)
        specs = queries, own, own, None if prefix is None else Prefix(shared, shared, counted)
        here = functools.partial(attention, **options)
        run = jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
        return run(queries_gkthd, keys_gknsd, values_gknsd, prefix)

    return on_mesh


def _join(x_gknqd):
    """`[g, k, n, q, d] -> [g, n, k * q, d]`: the queries of a whole group as one matrix."""
    g, k, n, q, d = x_gknqd.shape
    return jnp.swapaxes(x_gknqd, 1, 2).reshape(g, n, k * q, d)


def _split(x, k):
    """The inverse of `_join`."""
    g, n, rows, d = x.shape
    return jnp.swapaxes(x.reshape(g, n, k, rows // k, d), 1, 2)


def _scores(queries, keys: Stored):
    whole, scale = keys if isinstance(keys, Int8) else (keys, None)
    scores = einsum_f32("...qd,...sd->...qs", queries, whole.astype(queries.dtype))
    return scores if scale is None else scores * scale[..., None, :]


def _weighted(weights, values: Stored, dtype):
    if isinstance(values, Int8):
        weights, values = weights * values.scale[..., None, :], values.whole
    return einsum_f32("...qs,...sd->...qd", weights.astype(dtype), values.astype(dtype))
