"""A mixture of experts: each token goes through a few gated feed-forward layers of many.

Tokens are sorted by expert, so that each expert multiplies the tokens it was given and no others;
none is dropped, so a token's result does not depend on what else is in the batch.
Axes: n tokens, c experts of a token, e experts, d width, f inner width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvpo_jax.parallel.layout import activation_axes

_ROWS, _COLUMNS = 256, 1024  # of a block of that kernel


class Routing(NamedTuple):
    """Where the router of a layer sent each token.

    Attributes:
        likely: its probabilities, `[..., e]` float32.
        chosen: numbers of the experts that the token went through, `[..., c]`.
    """

    likely: jax.Array
    chosen: jax.Array


def mixture(
    x_nd: jax.Array,
    experts_nc: jax.Array,
    shares_nc: jax.Array,
    gate_edf: jax.Array,
    up_edf: jax.Array,
    down_efd: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The weighted sum of each token's experts, `[n, d]`.

    Args:
        x_nd: the tokens.
        experts_nc: numbers of the experts of each token; where one is not below e, it adds nothing.
        shares_nc: what each is multiplied by.
        gate_edf: the experts' weights, in the dtype of the tokens.
        up_edf: the same.
        down_efd: the same.
        activation: of the gate.
    """
    c = experts_nc.shape[1]
    e = gate_edf.shape[0]
    chosen = experts_nc.reshape(-1)
    order = jnp.argsort(chosen)
    sizes_e = jnp.sum(chosen[:, None] == jnp.arange(e)[None], axis=0, dtype=jnp.int32)
    rows = jnp.take(x_nd, order // c, axis=0)
    gate, up = (by_expert(rows, weights, sizes_e) for weights in (gate_edf, up_edf))
    out = by_expert(activation(gate) * up, down_efd, sizes_e)
    shares = shares_nc.reshape(-1)[order].astype(jnp.float32)
    # Rows behind the last expert's hold anything; left out before, not after, for the gradient too.
    known = jnp.where((jnp.take(chosen, order) < e)[:, None], out.astype(jnp.float32), 0)
    weighted = known * shares[:, None]
    return jnp.zeros(x_nd.shape, jnp.float32).at[order // c].add(weighted).astype(x_nd.dtype)


@jax.custom_vjp
def by_expert(rows_nd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    """Products of rows, the first `sizes_e[0]` with `weights_edf[0]` and so on, `[n, f]`.

    Rows behind the last expert's may hold anything. Their gradient is 0.
    """
    return jax.lax.ragged_dot(rows_nd, weights_edf, sizes_e)


def _by_expert_forward(rows_nd, weights_edf, sizes_e):
    return by_expert(rows_nd, weights_edf, sizes_e), (rows_nd, weights_edf, sizes_e)


def _by_expert_backward(given, grad_nf):
    rows_nd, weights_edf, sizes_e = given
    of_rows = jax.lax.ragged_dot(grad_nf, jnp.swapaxes(weights_edf, 1, 2), sizes_e)
    counted = jnp.arange(len(rows_nd)) < jnp.sum(sizes_e)
    of_weights = jax.lax.platform_dependent(
        rows_nd, grad_nf, sizes_e, tpu=weights_gradient_on_tpu, default=_weights_gradient
    )
    return jnp.where(counted[:, None], of_rows, 0), of_weights, None


by_expert.defvjp(_by_expert_forward, _by_expert_backward)


def _weights_gradient(rows_nd, grad_nf, sizes_e):
    """Of `by_expert`, `[e, d, f]`."""
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return jax.lax.ragged_dot_general(rows_nd, grad_nf, sizes_e, dims)


def weights_gradient_on_tpu(
    rows_nd: jax.Array, grad_nf: jax.Array, sizes_e: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The gradient of `by_expert`'s weights, `[e, d, f]`, by a kernel that takes rows in blocks.

    XLA:TPU has a grouped kernel for the other products, but multiplies all rows by every expert
    here. `interpret` runs the kernel without a TPU, slowly, to test it.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (n, d), f = rows_nd.shape, grad_nf.shape[1]
    rows, grad = (jnp.pad(x, ((0, -n % _ROWS), (0, 0))) for x in (rows_nd, grad_nf))
    tiles = _ROWS, min(d, _COLUMNS), min(f, _COLUMNS)
    return tgmm(rows.T, grad, sizes_e, rows.dtype, tiles, interpret=interpret)


def experts_on(mesh: Mesh) -> Callable[..., jax.Array]:
    """`of_tokens` for arrays on this mesh: experts lie along `tensor`, tokens stay where they are.

    Every device computes its own experts on its own tokens; what they give is summed.
    """
    if mesh.devices.size == 1:
        return of_tokens

    def on_mesh(x_gktd, experts_gktc, shares_gktc, *weights, activation):
        over_groups, over_k = activation_axes(mesh, *x_gktd.shape[:2])
        tokens, of_experts = P(over_groups, over_k), P("tensor")
        own = weights[0].shape[0] // mesh.shape["tensor"]

        def here(x, experts, shares, *weights):
            experts = experts - own * jax.lax.axis_index("tensor")
            experts = jnp.where(experts < 0, own, experts)
            out = of_tokens(x, experts, shares, *weights, activation=activation)
            return jax.lax.psum(out, "tensor")

        specs = (tokens,) * 3 + (of_experts,) * 3
        # Unchecked: the kernel does not say over which axes its result varies.
        run = jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
        return run(x_gktd, experts_gktc, shares_gktc, *weights)

    return on_mesh


def of_tokens(x_gktd, experts_gktc, shares_gktc, *weights, activation):
    """`mixture` of tokens `[g, k, t, d]`."""
    flat = (x.reshape(-1, x.shape[-1]) for x in (x_gktd, experts_gktc, shares_gktc))
    return functools.partial(mixture, activation=activation)(*flat, *weights).reshape(x_gktd.shape)
