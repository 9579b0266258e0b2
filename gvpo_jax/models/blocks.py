"""The blocks of the decoder; each declares by `DecoderConfig` what it computes.

Axes as in `gvpo_jax.ops.attention`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gvpo_jax.models.rope import rotate
from gvpo_jax.models.shape import DecoderConfig, DecoderOptions
from gvpo_jax.ops.attention import Stored, attend, seen_of_prefix, stored
from gvpo_jax.ops.experts import Routing
from gvpo_jax.ops.packing import PackedTokens, attend_unpacked

KeysValues = tuple[Stored, Stored]  # [g, k, n, s, d] each
Linear = Callable[..., nnx.Linear]


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's tanh form `x * (1 + tanh(y)) / 2`, `y` as below, as the sigmoid of `2 * y` it equals.

    `1 + tanh(y)` has hardly a correct digit below -4. In the gradient the error of `tanh` is
    multiplied by the cube of `x`, which is large in Gemma 4: no norm stands before its gates.
    """
    y = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * jax.nn.sigmoid(2 * y)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": gelu_tanh,
}


def normed(x: jax.Array, eps: float) -> jax.Array:
    """`[..., d]` over the root of its mean square, in float32."""
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Division by the root of the mean square, in float32, then a scale for each feature."""

    def __init__(self, size: int, c: DecoderConfig):
        self.scale = nnx.Param(jnp.zeros(size) if c.norm == "one_plus" else jnp.ones(size))
        self.config = c

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., d] -> [..., d]`."""
        y = normed(x, self.config.rms_norm_eps)
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
        kv_heads, self.head_dim = c.heads(layer)
        queries, keys = c.num_heads * self.head_dim, kv_heads * self.head_dim
        of_head, self.own_keys = c.qk_norm_over == "head", c.source(layer) is None
        self.own_values = not (c.keys_as_values and c.window(layer) is None)
        norm = RMSNorm if c.qk_norm else lambda size, c: _unchanged
        self.q = linear(c.hidden_size, queries, use_bias=c.qkv_bias)
        if self.own_keys:
            self.k = linear(c.hidden_size, keys, use_bias=c.qkv_bias)
            if self.own_values:
                self.v = linear(c.hidden_size, keys, use_bias=c.qkv_bias)
            self.k_norm = norm(self.head_dim if of_head else keys, c)
        self.q_norm = norm(self.head_dim if of_head else queries, c)
        self.o = linear(queries, c.hidden_size, use_bias=c.o_bias)
        self.config, self.options = c, options
        limits = ("window", c.window(layer)), ("cap", c.attn_logit_softcapping)
        self.limits = tuple((name, limit) for name, limit in limits if limit is not None)

    def __call__(self, x, rope, prefix, cache, at, given=None) -> tuple[jax.Array, KeysValues]:
        """`[g, k, t, d]` -> the same, and the keys and values of these tokens.

        given: keys and values as another layer returned them, for one without its own.
        """
        g, k, t, _ = x.shape
        if given is None:
            queries, keys, values = self._heads(x, rope)
            kv = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)  # [g, k, n, t, d]
        else:
            queries, kv = self._queries(x, rope), given
            keys, values = (jnp.swapaxes(x, 2, 3) for x in given)
        attention = functools.partial(self.options.attention, **dict(self.limits))
        if isinstance(at, PackedTokens):
            out = attend_unpacked(attention, self.options.constrain, at, queries, keys, values)
        elif cache is None:
            out = attention(queries, *kv, prefix)
        else:
            if given is None:
                kv = _write(cache[0], kv[0], at[1]), _write(cache[1], kv[1], at[1])
            out = self._decoded(queries, kv, prefix, *at)
        out = self.options.constrain("heads", out)
        return self.o(out.reshape(g, k, t, -1)), kv

    def _heads(self, x, rope):
        """Queries, keys and values `[g, k, t, h, d]`, normed and rotated."""
        c = self.config
        queries = self._split(self.q(x), self.q_norm)
        keys = self._split(raw := self.k(x), self.k_norm)
        values = self._split(self.v(x) if self.own_values else raw, _unchanged)
        if c.qk_norm_over == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if c.value_norm:
            values = normed(values, c.rms_norm_eps).astype(values.dtype)
        return self._turned(queries, rope), keys if rope is None else rotate(keys, rope), values

    def _queries(self, x, rope):
        """The first of them alone."""
        queries = self._split(self.q(x), self.q_norm)
        if self.config.qk_norm_over == "head":
            queries = self.q_norm(queries)
        return self._turned(queries, rope)

    def _split(self, y, norm):
        """`[g, k, t, h * d] -> [g, k, t, h, d]`, normed before where a norm sees all heads."""
        y = norm(y) if self.config.qk_norm_over == "width" else y
        return self.options.constrain("heads", y.reshape(*y.shape[:3], -1, self.head_dim))

    def _turned(self, queries, rope):
        if rope is not None:
            queries = rotate(queries, rope)
            if rope.growth is not None:
                queries = queries * rope.growth.astype(queries.dtype)
        if (multiplier := self.config.attention_multiplier) is not None:
            queries = queries * (multiplier * self.head_dim**0.5)  # attention divides by the root
        return queries

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

    def __init__(self, c: DecoderConfig, width: int, linear: Linear, options: DecoderOptions):
        self.gate = linear(c.hidden_size, width, use_bias=c.mlp_bias)
        self.up = linear(c.hidden_size, width, use_bias=c.mlp_bias)
        self.down = linear(width, c.hidden_size, use_bias=c.mlp_bias)
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
        if c.experts.shared_size is not None:
            self.shared = MLP(c, c.experts.shared_size, linear, options)
            self.shared_gate = linear(c.hidden_size, 1, use_bias=False)
        self.options, self.config, self.activation = options, c.experts, ACTIVATIONS[c.activation]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """`[g, k, t, d]` -> the same, and where its tokens went."""
        likely = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        shares, chosen = jax.lax.top_k(likely, self.config.per_token)
        if self.config.normalised:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        every = (self.experts.gate, self.experts.up, self.experts.down)
        weights = (w.kernel[...].astype(x.dtype) for w in every)
        shares = shares.astype(x.dtype)
        out = self.options.experts(x, chosen, shares, *weights, activation=self.activation)
        if self.config.shared_size is not None:
            out = out + jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x)
        return out, Routing(likely, chosen)


class PerLayer(nnx.Module):
    """What a layer makes of what it is told about each token, and of its own state."""

    def __init__(self, c: DecoderConfig, width: int, linear: Linear):
        self.gate = linear(c.hidden_size, width, use_bias=False)
        self.down = linear(width, c.hidden_size, use_bias=False)
        self.norm, self.activation = RMSNorm(c.hidden_size, c), ACTIVATIONS[c.activation]

    def __call__(self, x: jax.Array, told: jax.Array) -> jax.Array:
        """`[g, k, t, d]`, `[g, k, t, w] -> [g, k, t, d]`."""
        return self.norm(self.down(self.activation(self.gate(x)) * told))


class PerLayerTable(nnx.Module):
    """What all layers are told about a token: by a table of their own, and by its embedding."""

    def __init__(
        self, c: DecoderConfig, width: int, linear: Linear, options: DecoderOptions, rngs: nnx.Rngs
    ):
        every = c.num_layers * width
        self.embed = nnx.Embed(c.vocab_size, every, dtype=options.dtype, rngs=rngs)
        self.up = linear(c.hidden_size, every, use_bias=False)
        self.norm = RMSNorm(width, c)
        self.config, self.options, self.width = c, options, width

    def __call__(self, tokens_gkt: jax.Array, x: jax.Array) -> jax.Array:
        """Tokens and their embeddings `[g, k, t, d] -> [g, k, t, layers, w]`."""
        split = (*tokens_gkt.shape, self.config.num_layers, self.width)
        looked_up = jnp.take(self.embed.embedding[...], tokens_gkt, axis=0)
        looked_up = self.options.constrain("embedded", looked_up).astype(x.dtype).reshape(split)
        of_token = looked_up * jnp.asarray(self.width**0.5, x.dtype)
        of_embedding = self.norm((self.up(x) * self.config.hidden_size**-0.5).reshape(split))
        return (of_embedding + of_token) * 2**-0.5


class LayerScalar(nnx.Module):
    """A number from the file that a layer's result is multiplied by; it is not trained."""

    def __init__(self):
        self.scalar = nnx.Param(jnp.ones(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[g, k, t, d] -> [g, k, t, d]`."""
        return x * jax.lax.stop_gradient(self.scalar[...]).astype(x.dtype)[None, None, None]


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
        width = c.intermediate_size * (1 if c.source(layer) is None else c.shared_width)
        self.mlp = MLP(c, width, linear, options) if dense else Mixture(c, linear, options, rngs)
        self.mlp_out_norm = norm("after")
        if c.per_layer_width is not None:
            self.per_layer = PerLayer(c, c.per_layer_width, linear)
        self.out = LayerScalar() if c.layer_scalar else _unchanged
        self.config, self.options = c, options

    def __call__(
        self, x, rope, prefix, cache, at, given=None, told=None
    ) -> tuple[jax.Array, KeysValues, Routing | None]:
        """As `Attention`, and where a mixture's tokens went.

        told: `[g, k, t, w]`, see `DecoderConfig.per_layer_width`.
        """
        attended, kv = self.attn(self.input_norm(x), rope, prefix, cache, at, given)
        x = self._add(x, self.attn_out_norm(attended))
        y, routing = self.mlp(self.post_norm(x)), None
        if isinstance(y, tuple):
            y, routing = y
        x = self._add(x, self.mlp_out_norm(y))
        if told is not None:
            x = self._add(x, self.per_layer(x, told))
        return self.out(x), kv, routing

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
