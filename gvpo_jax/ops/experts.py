"""A mixture of experts: each token goes through a few gated feed-forward layers of many.

Tokens are sorted by expert, so that each expert multiplies the tokens it was given and no others;
none is dropped, so a token's result does not depend on what else is in the batch.
Axes: n tokens, c experts of a token, e experts, d width, f inner width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvpo_jax.parallel.layout import activation_axes


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
    gate, up = (jax.lax.ragged_dot(rows, weights, sizes_e) for weights in (gate_edf, up_edf))
    out = jax.lax.ragged_dot(activation(gate) * up, down_efd, sizes_e)
    shares = jnp.where(chosen < e, shares_nc.reshape(-1), 0)[order].astype(jnp.float32)
    # Rows behind the last expert's hold anything.
    weighted = jnp.where(shares[:, None] == 0, 0, out.astype(jnp.float32) * shares[:, None])
    return jnp.zeros(x_nd.shape, jnp.float32).at[order // c].add(weighted).astype(x_nd.dtype)


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
            x, shares = (jax.lax.pcast(y, "tensor", to="varying") for y in (x, shares))
            out = of_tokens(x, experts, shares, *weights, activation=activation)
            return jax.lax.psum(out, "tensor")

        specs = (tokens,) * 3 + (of_experts,) * 3
        run = jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=tokens)
        return run(x_gktd, experts_gktc, shares_gktc, *weights)

    return on_mesh


def of_tokens(x_gktd, experts_gktc, shares_gktc, *weights, activation):
    """`mixture` of tokens `[g, k, t, d]`."""
    flat = (x.reshape(-1, x.shape[-1]) for x in (x_gktd, experts_gktc, shares_gktc))
    return functools.partial(mixture, activation=activation)(*flat, *weights).reshape(x_gktd.shape)
