"""The decoder of the Llama, Qwen2/2.5 and Qwen3 families: Flax NNX, used as plain functions.

Parameters are a plain nested dict of arrays. `decoder_fns` gives the methods of `Decoder` as
functions of them, for `jax.jit`. Each prompt is computed once, whatever k.
Axes as in `gvpo_jax.ops.attention`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gvpo_jax.logprobs import CHUNK_BYTES, completion_mask
from gvpo_jax.ops.attention import Int8, Prefix, Stored, attend, causal, stored
from gvpo_jax.ops.packing import PackedTokens, attend_unpacked

Params = dict[str, Any]
Remat = Literal["none", "dots", "layer"]
KeysValues = tuple[Stored, Stored]  # [g, k, n, s, d] each
Linear = Callable[..., nnx.Linear]


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of the slow rotary frequencies, for contexts beyond the trained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder, under a transformers config's names where it has them."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 32_768


@dataclass(frozen=True)
class DecoderOptions:
    """How a decoder is computed; by default in float32 on one device.

    Attributes:
        dtype: of the computation.
        remat: what the backward pass computes again: nothing, all but products with weights, or
            whole layers.
        cache_dtype: of the keys and values that decoding keeps, `jnp.int8` too, see
            `attention.stored`; None: as computed.
        constrain: `(name, x) -> x` lays out "embedded" and "residual" `[g, k, t, d]`, "heads"
            `[g, k, t, h, d]`, "mlp" `[g, k, t, f]` and "table" `[v, d]`, the head, while tracing.
        params: `params -> params` keeps them, and so their gradients, as they lie.
        attention: see `gvpo_jax.ops.attention.causal`.
        product: `jax.lax.dot_general` of activations and a layer's weights; one with a gradient of
            its own gives what it returns the `checkpoint_name` "product".
        chunk_bytes, shards: see `DecoderFns`.
    """

    dtype: Any = jnp.float32
    remat: Remat = "none"
    cache_dtype: Any = None
    constrain: Callable[[str, jax.Array], jax.Array] = lambda name, x: x
    params: Callable[[Params], Params] = lambda params: params
    attention: Callable[..., jax.Array] = causal
    product: Callable[..., jax.Array] = jax.lax.dot_general
    chunk_bytes: int = CHUNK_BYTES
    shards: int = 1


class RMSNorm(nnx.Module):
    """Division by the root of the mean square, in float32, then a scale for each feature."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., d] -> [..., d]`."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * jnp.expand_dims(
            self.scale[...].astype(x.dtype), range(x.ndim - 1)
        )


class Attention(nnx.Module):
    """Attention with grouped heads and rotary positions, over prompt, cache or packed tokens."""

    def __init__(self, c: DecoderConfig, linear: Linear, options: DecoderOptions):
        self.q = linear(c.hidden_size, c.num_heads * c.head_dim, use_bias=c.qkv_bias)
        self.k = linear(c.hidden_size, c.num_kv_heads * c.head_dim, use_bias=c.qkv_bias)
        self.v = linear(c.hidden_size, c.num_kv_heads * c.head_dim, use_bias=c.qkv_bias)
        self.o = linear(c.num_heads * c.head_dim, c.hidden_size, use_bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.config, self.options = c, options

    def __call__(self, x, rope, prefix, cache, at) -> tuple[jax.Array, KeysValues]:
        """`[g, k, t, d]` -> the same, and the keys and values of these tokens."""
        g, k, t, _ = x.shape

        def heads(linear):
            y = linear(x).reshape(g, k, t, -1, self.config.head_dim)
            return self.options.constrain("heads", y)

        queries, keys, values = heads(self.q), heads(self.k), heads(self.v)
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = _rotate(queries, rope), _rotate(keys, rope)
        kv = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)  # [g, k, n, t, d]
        if isinstance(at, PackedTokens):
            out = attend_unpacked(
                self.options.attention, self.options.constrain, at, queries, keys, values
            )
        elif cache is None:
            out = self.options.attention(queries, *kv, prefix)
        else:
            before_gk, place = at
            kv = _write(cache[0], kv[0], place), _write(cache[1], kv[1], place)
            size = jax.tree.leaves(kv)[0].shape[3]
            age = (place - jnp.arange(size)) % size
            so_far = age[None, None, None] <= before_gk[..., None, None]
            out = attend(queries, *kv, so_far, prefix)
        out = self.options.constrain("heads", out)
        return self.o(out.reshape(g, k, t, -1)), kv


class MLP(nnx.Module):
    """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig, linear: Linear, options: DecoderOptions):
        self.gate = linear(c.hidden_size, c.intermediate_size, use_bias=c.mlp_bias)
        self.up = linear(c.hidden_size, c.intermediate_size, use_bias=c.mlp_bias)
        self.down = linear(c.intermediate_size, c.hidden_size, use_bias=c.mlp_bias)
        self.options = options

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[g, k, t, d] -> [g, k, t, d]`."""
        gate, up = (self.options.constrain("mlp", linear(x)) for linear in (self.gate, self.up))
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Attention and feed-forward layer, each behind a norm and added to the residual."""

    def __init__(self, c: DecoderConfig, linear: Linear, options: DecoderOptions):
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attn = Attention(c, linear, options)
        self.post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c, linear, options)
        self.options = options

    def __call__(self, x, rope, prefix, cache, at) -> tuple[jax.Array, KeysValues]:
        """As `Attention`."""
        attended, kv = self.attn(self.input_norm(x), rope, prefix, cache, at)
        x = self.options.constrain("residual", x + attended)
        return self.options.constrain("residual", x + self.mlp(self.post_norm(x))), kv


class Decoder(nnx.Module):
    """A stack of blocks over tokens `[g, k, t]`; k = 1 for prompts and for `PackedTokens`."""

    def __init__(self, c: DecoderConfig, options: DecoderOptions, rngs: nnx.Rngs):
        dtype = options.dtype
        linear = functools.partial(nnx.Linear, dtype=dtype, dot_general=options.product, rngs=rngs)
        self.embed = nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(c, linear, options) for _ in range(c.num_layers)])
        self.final_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_embeddings:
            self.head = linear(c.hidden_size, c.vocab_size, use_bias=False)
        self.config, self.options = c, options

    def __call__(
        self,
        tokens_gkt: jax.Array,
        positions_gkt: jax.Array,
        prefix: list[Prefix] | None = None,
        cache: list[KeysValues] | None = None,
        at: tuple[jax.Array, jax.Array] | PackedTokens | None = None,
    ) -> tuple[jax.Array, list[tuple[Any, Any]]]:
        """The hidden states, and each layer's keys and values."""
        # Looked up in float32, so that the gradients of a frequent token add up in it.
        x = jnp.take(self.embed.embedding[...], tokens_gkt, axis=0)
        x = self.options.constrain("embedded", x).astype(self.options.dtype)
        x = self.options.constrain("residual", x)
        rope = _rope(self.config, positions_gkt)
        run, kvs = _with_remat(self.options.remat), []
        for i, layer in enumerate(self.layers):
            x, kv = run(layer, x, rope, prefix and prefix[i], cache and cache[i], at)
            kvs.append(kv)
        return self.final_norm(x), kvs

    def prefill(self, prompts_gp, lengths_g):
        """See `DecoderFns`, as for the methods below."""
        last_gd, prefix = self._prompts(prompts_gp, lengths_g)
        keep: Any = functools.partial(stored, dtype=_cache_dtype(self.options))
        return last_gd, [Prefix(keep(keys), keep(values), mask) for keys, values, mask in prefix]

    def decode(self, tokens_gk, lengths_g, prefix, cache, before_gk, place):
        """See `DecoderFns`."""
        positions_gk, at = lengths_g[:, None] + before_gk, (before_gk, place)
        hidden, cache = self(tokens_gk[..., None], positions_gk[..., None], prefix, cache, at)
        return hidden[:, :, 0], cache

    def completion_hidden(self, prompts_gp, lengths_g, completions_gkt):
        """See `DecoderFns`."""
        g, k, t = completions_gkt.shape
        last_gd, prefix = self._prompts(prompts_gp, lengths_g)
        first = jnp.broadcast_to(last_gd[:, None, None], (g, k, 1, last_gd.shape[-1]))
        if t == 1:
            return first
        inputs = completions_gkt[..., :-1]
        rest, _ = self(inputs, _positions(inputs, lengths_g), prefix)
        return jnp.concatenate([first, rest], axis=2)

    def packed_hidden(self, prompts_gp, completions_gkt, packed: PackedTokens):
        """See `DecoderFns`."""
        prompts = prompts_gp[:, None]
        positions = _positions(prompts), _positions(completions_gkt, packed.prompt_lengths)
        tokens = packed.pack(prompts, completions_gkt)
        hidden, _ = self(tokens, packed.pack(*positions), at=packed)
        return packed.last_of_prompts(hidden), hidden[:, 0]

    def output_embedding(self):
        """The head, `[v, d]`."""
        # In float32, so that its gradients add up in it, chunk by chunk; `token_logprobs` casts.
        tied = self.config.tie_embeddings
        table = self.embed.embedding[...] if tied else self.head.kernel[...].T
        return self.options.constrain("table", table)

    def _prompts(self, prompts_gp, lengths_g):
        """The prompts alone: their last real hidden state and every layer's keys and values."""
        prompts = prompts_gp[:, None]
        hidden, kvs = self(prompts, _positions(prompts))
        last = jnp.take_along_axis(hidden[:, 0], (lengths_g - 1)[:, None, None], axis=1)[:, 0]
        mask = completion_mask(lengths_g, prompts_gp.shape[1])
        return last, [Prefix(keys[:, 0], values[:, 0], mask) for keys, values in kvs]


@dataclass(frozen=True)
class DecoderFns:
    """The model as functions of its parameters: what rollout, scoring and the train step are given.

    Any model that offers these plugs in; only it looks into the pytrees `prefix`, `cache`.

    Attributes:
        prefill: `(params, prompts [G, P], lengths [G]) -> (hidden [G, D], prefix)`; every array of
            the prefix has the groups first.
        empty_cache: `(groups, k, max_completion_length) -> cache`.
        decode: `(params, tokens [G, k], lengths [G], prefix, cache, before [G, k], place) ->
            (hidden [G, k, D], cache)`, where `before` counts a completion's tokens that came
            before. They lie at the places just before `place` in the cache, which is a ring.
        completion_hidden: `(params, prompts [G, P], lengths [G], completions [G, k, T]) ->
            [G, k, T, D]`, the hidden states that predict each completion token.
        packed_hidden: `(params, prompts [G, P], completions [G, k, T - 1], packed) ->
            (first [G, D], rest [S, n, D])`, the same for `gvpo_jax.ops.packing.PackedTokens`: what
            predicts the first tokens of a group, and in each completion token's place what predicts
            the next one. None: the model has no such function.
        head: `params -> [V, D]`, the output embedding.
        shards: parts that the devices cut a batch into, group by group.
        chunk_bytes: of logits that a device holds at once, where they are more than it keeps.
    """

    prefill: Callable[..., Any]
    empty_cache: Callable[..., Any]
    decode: Callable[..., Any]
    completion_hidden: Callable[..., jax.Array]
    head: Callable[[Params], jax.Array]
    shards: int = 1
    chunk_bytes: int = CHUNK_BYTES
    packed_hidden: Callable[..., tuple[jax.Array, jax.Array]] | None = None


def decoder_fns(config: DecoderConfig, options: DecoderOptions = DecoderOptions()) -> DecoderFns:
    """The methods of a decoder as functions of its parameters."""
    graph = _graph(config, options)

    def of_params(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *arrays: method(nnx.merge(graph, options.params(params)), *arrays)

    return DecoderFns(
        prefill=of_params(Decoder.prefill),
        empty_cache=functools.partial(_empty_cache, config, _cache_dtype(options)),
        decode=of_params(Decoder.decode),
        completion_hidden=of_params(Decoder.completion_hidden),
        head=of_params(Decoder.output_embedding),
        shards=options.shards,
        chunk_bytes=options.chunk_bytes,
        packed_hidden=of_params(Decoder.packed_hidden),
    )


@functools.lru_cache(maxsize=4)  # tracing many layers takes seconds, and several ask
def param_shapes(config: DecoderConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, to be read only: nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, 0))


def init_params(config: DecoderConfig, seed: int) -> Params:
    """Random parameters, for tests and toy runs."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, DecoderOptions(), nnx.Rngs(seed))))


def full_logits(config: DecoderConfig, params: Params, tokens_bt: jax.Array) -> jax.Array:
    """Float32 logits `[b, t, v]` of whole sequences: the plain route to test the others against."""
    model = nnx.merge(_graph(config, DecoderOptions()), params)
    hidden, _ = model(tokens_bt[:, None], _positions(tokens_bt[:, None]))
    return hidden[:, 0] @ model.output_embedding().T


@functools.lru_cache
def _graph(config: DecoderConfig, options: DecoderOptions):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, options, nnx.Rngs(0))))[0]


def _with_remat(remat: Remat):
    if remat == "none":
        return Block.__call__
    keep = jax.checkpoint_policies
    dots = keep.save_from_both_policies(
        keep.dots_with_no_batch_dims_saveable, keep.save_only_these_names("product")
    )
    return nnx.remat(Block.__call__, policy=dots if remat == "dots" else None)


def _positions(tokens_gkt, start_g=None):
    """The position of each token, from 0 on or from where its group's completions start."""
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens_gkt.shape, 2)
    return positions if start_g is None else start_g[:, None, None] + positions


def _cache_dtype(options: DecoderOptions):
    return options.dtype if options.cache_dtype is None else options.cache_dtype


def _empty_cache(config, dtype, groups, k, length):
    shape = (groups, k, config.num_kv_heads, length, config.head_dim)

    def empty() -> Stored:
        zeros = jnp.zeros(shape, dtype)
        return Int8(zeros, jnp.zeros(shape[:-1])) if zeros.dtype == jnp.int8 else zeros

    return [(empty(), empty()) for _ in range(config.num_layers)]


def _write(cache: Stored, new: jax.Array, place) -> Stored:
    def write(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=3)

    return jax.tree.map(write, cache, stored(new, jax.tree.leaves(cache)[0].dtype))


def _rope(config, positions_gkt):
    """Cos and sin `[g, k, t, 1, hd/2]` of the rotary angles, in float32."""
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        freqs = _stretch(freqs, config.rope_scaling)
    angles = positions_gkt[..., None, None].astype(jnp.float32) * freqs[None, None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _stretch(freqs, scaling: RopeScaling):
    """Llama-3 scaling: long waves slowed by `factor`, short ones kept, a linear blend between."""
    wavelengths = 2 * jnp.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / wavelengths
    blend = jnp.clip((turns - low) / (high - low), 0, 1)
    return freqs * (blend + (1 - blend) / scaling.factor)


def _rotate(x_gkthd, rope):
    cos, sin = (a.astype(x_gkthd.dtype) for a in rope)
    a, b = jnp.split(x_gkthd, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
