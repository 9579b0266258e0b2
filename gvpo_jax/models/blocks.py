"""The blocks of the decoder; each declares by `DecoderConfig` what it computes.

Axes as in `gvpo_jax.ops.attention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gvpo_jax.models.rope import rotate
from gvpo_jax.models.shape import DecoderConfig, DecoderOptions
from gvpo_jax.ops.attention import Stored, attend, seen_of_prefix, stored
from gvpo_jax.ops.packing import PackedTokens, attend_unpacked

KeysValues = tuple[Stored, Stored]  # [g, k, n, s, d] each
Linear = Callable[..., nnx.Linear]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """Division by the root of the mean square, in float32, then a scale for each feature."""

    def __init__(self, size: int, c: DecoderConfig):
        self.scale = nnx.Param(jnp.zeros(size) if c.norm == "one_plus" else jnp.ones(size))
        self.config = c

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., d] -> [..., d]`."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        if self.config.norm == "rounded":
            return y.astype(x.dtype) * jnp.expand_dims(
                self.scale[...].astype(x.dtype), range(x.ndim - 1)
            )
        scale = self.scale[...].astype(jnp.float32)  # the file's: exported as it came
        scale = 1 + scale if self.config.norm == "one_plus" else scale
        return (y * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Attention(nnx.Module):
    """Attention with grouped heads and rotary positions, over prompt, cache or packed tokens."""

    def __init__(self, c: DecoderConfig, layer: int, linear: Linear, options: DecoderOptions):
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = linear(c.hidden_size, queries, use_bias=c.qkv_bias)
        self.k = linear(c.hidden_size, keys, use_bias=c.qkv_bias)
        self.v = linear(c.hidden_size, keys, use_bias=c.qkv_bias)
        self.o = linear(queries, c.hidden_size, use_bias=c.o_bias)
        if c.qk_norm:
            of_head = c.qk_norm_over == "head"
            self.q_norm = RMSNorm(c.head_dim if of_head else queries, c)
            self.k_norm = RMSNorm(c.head_dim if of_head else keys, c)
        self.config, self.options = c, options
        limits = ("window", c.window(layer)), ("cap", c.attn_logit_softcapping)
        self.limits = tuple((name, limit) for name, limit in limits if limit is not None)

    def __call__(self, x, rope, prefix, cache, at) -> tuple[jax.Array, KeysValues]:
        """`[g, k, t, d]` -> the same, and the keys and values of these tokens."""
        g, k, t, _ = x.shape
        queries, keys, values = self._heads(x, rope)
        kv = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)  # [g, k, n, t, d]
        attention = functools.partial(self.options.attention, **dict(self.limits))
        if isinstance(at, PackedTokens):
            out = attend_unpacked(attention, self.options.constrain, at, queries, keys, values)
        elif cache is None:
            out = attention(queries, *kv, prefix)
        else:
            kv = _write(cache[0], kv[0], at[1]), _write(cache[1], kv[1], at[1])
            out = self._decoded(queries, kv, prefix, *at)
        out = self.options.constrain("heads", out)
        return self.o(out.reshape(g, k, t, -1)), kv

    def _heads(self, x, rope):
        """Queries, keys and values `[g, k, t, h, d]`, normed and rotated."""
        c = self.config

        def heads(y):
            return self.options.constrain("heads", y.reshape(*x.shape[:3], -1, c.head_dim))

        if c.qk_norm and c.qk_norm_over == "width":
            queries, keys = heads(self.q_norm(self.q(x))), heads(self.k_norm(self.k(x)))
            values = heads(self.v(x))
        else:
            queries, keys, values = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
            if c.qk_norm:
                queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rope is not None:
            queries, keys = rotate(queries, rope), rotate(keys, rope)
        if c.attention_multiplier is not None:  # attention itself divides by sqrt(head_dim)
            queries = queries * (c.attention_multiplier * c.head_dim**0.5)
        return queries, keys, values

    def _decoded(self, queries, kv: KeysValues, prefix, before_gk, place):
        """Attention of one token each to the prompt and to the cache, a ring."""
        size = jax.tree.leaves(kv)[0].shape[3]
        age = (place - jnp.arange(size)) % size
        so_far = age[None, None, None] <= before_gk[..., None, None]
        limits: dict[str, Any] = dict(self.limits)
        if (window := limits.pop("window", None)) is not None:
            so_far = so_far & (age < window)[None, None, None]
            limits["shared_mask_gktp"] = seen_of_prefix(prefix, before_gk[..., None], window)
        return attend(queries, *kv, so_far, prefix, **limits)


class MLP(nnx.Module):
    """The gated feed-forward layer: down(activation(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig, linear: Linear, options: DecoderOptions):
        self.gate = linear(c.hidden_size, c.intermediate_size, use_bias=c.mlp_bias)
        self.up = linear(c.hidden_size, c.intermediate_size, use_bias=c.mlp_bias)
        self.down = linear(c.intermediate_size, c.hidden_size, use_bias=c.mlp_bias)
        self.options, self.activation = options, ACTIVATIONS[c.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[g, k, t, d] -> [g, k, t, d]`."""
        gate, up = (self.options.constrain("mlp", linear(x)) for linear in (self.gate, self.up))
        return self.down(self.activation(gate) * up)


class ExpertWeights(nnx.Module):
    """One of the three matrices of all experts, `[e, in, out]`."""

    def __init__(self, count: int, n_in: int, n_out: int, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (count, n_in, n_out)))


class ExpertStack(nnx.Module):
    """The experts of a layer: each an `MLP` without biases."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        assert c.experts is not None
        e, d, f = c.experts.count, c.hidden_size, c.experts.intermediate_size
        self.gate = ExpertWeights(e, d, f, rngs)
        self.up = ExpertWeights(e, d, f, rngs)
        self.down = ExpertWeights(e, f, d, rngs)


class Mixture(nnx.Module):
    """A router that sends each token through a few experts; see `gvpo_jax.ops.experts`."""

    def __init__(self, c: DecoderConfig, linear: Linear, options: DecoderOptions, rngs: nnx.Rngs):
        assert c.experts is not None
        self.router = linear(c.hidden_size, c.experts.count, use_bias=False)
        self.experts = ExpertStack(c, rngs)
        self.options, self.config, self.activation = options, c.experts, ACTIVATIONS[c.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[g, k, t, d] -> [g, k, t, d]`."""
        likely = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        shares, chosen = jax.lax.top_k(likely, self.config.per_token)
        if self.config.normalised:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        every = (self.experts.gate, self.experts.up, self.experts.down)
        weights = (w.kernel[...].astype(x.dtype) for w in every)
        shares = shares.astype(x.dtype)
        return self.options.experts(x, chosen, shares, *weights, activation=self.activation)


class Block(nnx.Module):
    """Attention and feed-forward layer, with norms before or after, added to the residual."""

    def __init__(
        self, c: DecoderConfig, layer: int, linear: Linear, options: DecoderOptions, rngs: nnx.Rngs
    ):
        def norm(place):
            return RMSNorm(c.hidden_size, c) if c.norms in (place, "both") else _unchanged

        self.input_norm = norm("before")
        self.attn = Attention(c, layer, linear, options)
        self.attn_out_norm = norm("after")
        self.post_norm = norm("before")  # after attention, before the feed-forward layer
        dense = c.experts is None or layer in c.experts.dense_layers
        self.mlp = MLP(c, linear, options) if dense else Mixture(c, linear, options, rngs)
        self.mlp_out_norm = norm("after")
        self.config, self.options = c, options

    def __call__(self, x, rope, prefix, cache, at) -> tuple[jax.Array, KeysValues]:
        """As `Attention`."""
        attended, kv = self.attn(self.input_norm(x), rope, prefix, cache, at)
        x = self._add(x, self.attn_out_norm(attended))
        return self._add(x, self.mlp_out_norm(self.mlp(self.post_norm(x)))), kv

    def _add(self, x, y):
        if self.config.residual_multiplier is not None:
            y = y * self.config.residual_multiplier
        return self.options.constrain("residual", x + y)


def _unchanged(x: jax.Array) -> jax.Array:
    return x


def _write(cache: Stored, new: jax.Array, place) -> Stored:
    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=3)

    return jax.tree.map(write, cache, stored(new, jax.tree.leaves(cache)[0].dtype))
