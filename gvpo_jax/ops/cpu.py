"""What only a CPU gains from: attention in parts that fit its cache, products that transpose less.

The figures behind it are in experiments/bench/README.md.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gvpo_jax.ops.attention import Prefix, causal, on_each_device

AT_ONCE = 2**24  # bytes of scores, on a CPU


def product_on(mesh: Mesh) -> Callable[..., jax.Array]:
    """`jax.lax.dot_general` as `nnx.Linear` calls it, for arrays on this mesh."""
    if mesh.devices.flat[0].platform != "cpu":
        return jax.lax.dot_general
    # The name is what `model.remat=dots` knows it by: policies do not look into custom gradients.
    return lambda x, weights, *_, **defaults: checkpoint_name(_product(x, weights), "product")


@on_each_device
def on_cpu(
    queries_gkthd, keys_gknsd, values_gknsd, prefix, *, window=None, cap=None, at_once=AT_ONCE
):
    """See `attention.causal`: large inputs one key-value head of one group after the other.

    Such a part stays in a processor's cache. Its scores are computed again in the backward pass.
    Memory is that of one part: new pages cost a CPU about as much as computing what goes into them.

    at_once: bytes of scores up to which all is one part.
    """
    g, k, t, h, d = queries_gkthd.shape
    n, s = keys_gknsd.shape[2:4]
    whole = 4 * g * k * h * t * (s + (0 if prefix is None else prefix.keys.shape[2]))
    limited = functools.partial(causal, window=window, cap=cap)
    if whole <= at_once:
        return limited(queries_gkthd, keys_gknsd, values_gknsd, prefix)

    def each_head(x_gkn):
        return jnp.swapaxes(x_gkn, 1, 2).reshape(g * n, 1, k, 1, *x_gkn.shape[3:])

    queries = jnp.moveaxis(queries_gkthd.reshape(g, k, t, n, h // n, d), 3, 1)
    parts = (
        queries.reshape(g * n, 1, k, t, h // n, d),
        each_head(keys_gknsd),
        each_head(values_gknsd),
    )
    if prefix is not None:
        keys, values = (x.reshape(g * n, 1, 1, -1, d) for x in prefix[:2])
        parts = *parts, Prefix(keys, values, jnp.repeat(prefix.mask, n, axis=0)[:, None])
    out = jax.lax.map(jax.checkpoint(lambda part: limited(*part)), parts)
    return jnp.moveaxis(out.reshape(g, n, k, t, h // n, d), 1, 3).reshape(g, k, t, h, d)


@jax.custom_vjp
def _product(x, weights):
    """`[..., a], [a, b] -> [..., b]`.

    The gradient of the weights needs one of its factors transposed: that is the narrower one here,
    where JAX takes the other for a layer that widens.
    """
    return jax.lax.dot_general(x, weights, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x, weights):
    return _product(x, weights), (x, weights)


def _product_backward(kept, d_out):
    (x, weights), rows = kept, tuple(range(d_out.ndim - 1))
    d_x = jax.lax.dot_general(d_out, weights, (((d_out.ndim - 1,), (1,)), ((), ())))
    if x.shape[-1] <= d_out.shape[-1]:
        return d_x, jax.lax.dot_general(x, d_out, ((rows, rows), ((), ())))
    return d_x, jax.lax.dot_general(d_out, x, ((rows, rows), ((), ()))).T


_product.defvjp(_product_forward, _product_backward)
