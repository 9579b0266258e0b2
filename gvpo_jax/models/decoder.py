"""The decoder of all families: Flax NNX, used as plain functions.

Parameters are a plain nested dict of arrays. `decoder_fns` gives the methods of `Decoder` as
functions of them, for `jax.jit`. Each prompt is computed once, whatever k.
Axes as in `gvpo_jax.ops.attention`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gvpo_jax.logprobs import CHUNK_BYTES, completion_mask, soft_cap
from gvpo_jax.models.blocks import Block, KeysValues, PerLayerTable, RMSNorm
from gvpo_jax.models.lora import adapt
from gvpo_jax.models.quantized import promote
from gvpo_jax.models.rope import rotations
from gvpo_jax.models.shape import PLAIN, DecoderConfig, DecoderOptions, Params, Remat
from gvpo_jax.models.stacking import Places, Stacking, stacking_of
from gvpo_jax.ops.attention import Int8, Prefix, Stored, stored
from gvpo_jax.ops.experts import Routing
from gvpo_jax.ops.packing import PackedTokens
from gvpo_jax.parallel.layout import STACKED


class Decoder(nnx.Module):
    """A stack of blocks over tokens `[g, k, t]`; k = 1 for prompts and for `PackedTokens`."""

    def __init__(
        self,
        c: DecoderConfig,
        options: DecoderOptions,
        rngs: nnx.Rngs,
        places: Places | None = None,
    ):
        dtype = options.dtype
        self.places = places or tuple((layer,) for layer in range(c.num_layers))
        linear = functools.partial(
            nnx.Linear, dtype=dtype, promote_dtype=promote, dot_general=options.product, rngs=rngs
        )
        self.embed = nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        if c.per_layer_width is not None:
            self.per_layer = PerLayerTable(c, c.per_layer_width, linear, options, rngs)
        self.layers = nnx.List([Block(c, i[0], linear, options, rngs) for i in self.places])
        if options.lora is not None:
            adapt(self.layers, options.lora, rngs)
        self.final_norm = RMSNorm(c.hidden_size, c)
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
    ) -> tuple[jax.Array, list[Any], list[Routing]]:
        """Hidden states, each layer's keys and values, and the routing of those with experts."""
        # Looked up in float32, so that the gradients of a frequent token add up in it.
        x = jnp.take(self.embed.embedding[...], tokens_gkt, axis=0)
        x = self.options.constrain("embedded", x).astype(self.options.dtype)
        if (multiplier := self.config.embedding_multiplier) is not None:
            x = x * jnp.asarray(multiplier, x.dtype)
        x = self.options.constrain("residual", x)
        ropes = _ropes(self.config, positions_gkt)
        told = None if self.config.per_layer_width is None else self.per_layer(tokens_gkt, x)
        run, kvs, routings = _with_remat(self.options.remat), [], []
        scanned = [i for i, place in enumerate(self.places) if len(place) > 1]
        for i, ((layer, *others), block) in enumerate(zip(self.places, self.layers, strict=True)):
            if others:
                if i == scanned[0]:
                    x, more, routed = self._scan(scanned, x, ropes, prefix, at, told)
                    kvs, routings = kvs + more, routings + routed
                continue
            source = self.config.source(layer)
            kept = layer if source is None else source
            args = x, ropes[layer], prefix and prefix[kept], cache and cache[kept], at
            given = None if source is None else kvs[source]
            of_layer = None if told is None else told[..., layer, :]
            x, kv, routing = run(block, *args, given, of_layer)
            kvs.append(kv if source is None else None)
            routings += [] if routing is None else [routing]
        hidden = self.final_norm(x)
        if (divisor := self.config.logits_scaling) is not None:
            hidden = hidden / divisor
        return hidden, kvs, routings

    def _scan(self, scanned, x, ropes, prefix, at, told):
        """The same for the layers at these places, which are stacked: one period after another."""
        periods = list(zip(*(self.places[i] for i in scanned), strict=True))
        graph, weights = nnx.split(nnx.List([self.layers[i] for i in scanned]))
        rows = [layer for period in periods for layer in period]
        of_layers = prefix and _stacked([prefix[layer] for layer in rows], len(scanned))
        if told is not None:
            told = _stacked([told[..., layer, :] for layer in rows], len(scanned))
        # Else nobody attends to them from elsewhere.
        keep = self.config.shared_layers > 0 or not isinstance(at, PackedTokens)
        run = _with_remat(self.options.remat, in_loop=True)

        def period(x, given):
            weights, prefix, told = given
            kvs, routings = [], []
            for j, block in enumerate(nnx.merge(graph, weights)):
                args = x, ropes[periods[0][j]], prefix and prefix[j], None, at, None
                x, kv, routing = run(block, *args, told and told[j])
                kvs.append(kv if keep else None)
                routings.append(routing)
            return x, (kvs, routings)

        x, of_periods = jax.lax.scan(period, x, (weights, of_layers, told))
        every = [
            jax.tree.map(lambda y, i=i: y[i], of_period)
            for i in range(len(periods))
            for of_period in zip(*of_periods, strict=True)
        ]
        kvs, routings = zip(*every, strict=True)
        return x, list(kvs), [routing for routing in routings if routing is not None]

    # What follows returns the routing of layers with experts behind what `DecoderFns` says.

    def prefill(self, prompts_gp, lengths_g):
        """See `DecoderFns`, as for the methods below."""
        last_gd, prefix, routings = self._prompts(prompts_gp, lengths_g)
        keep: Any = functools.partial(stored, dtype=_cache_dtype(self.options))
        prefix = [x and Prefix(keep(x.keys), keep(x.values), x.mask) for x in prefix]
        return (last_gd, prefix), routings

    def decode(self, tokens_gk, lengths_g, prefix, cache, before_gk, place):
        """See `DecoderFns`."""
        positions_gk, at = lengths_g[:, None] + before_gk, (before_gk, place)
        tokens, positions = tokens_gk[..., None], positions_gk[..., None]
        hidden, cache, routings = self(tokens, positions, prefix, cache, at)
        return (hidden[:, :, 0], cache), routings

    def completion_hidden(self, prompts_gp, lengths_g, completions_gkt):
        """See `DecoderFns`."""
        g, k, t = completions_gkt.shape
        last_gd, prefix, of_prompts = self._prompts(prompts_gp, lengths_g)
        first = jnp.broadcast_to(last_gd[:, None, None], (g, k, 1, last_gd.shape[-1]))
        if t == 1:
            return first, (of_prompts, [])
        inputs = completions_gkt[..., :-1]
        rest, _, routings = self(inputs, _positions(inputs, lengths_g), prefix)
        return jnp.concatenate([first, rest], axis=2), (of_prompts, routings)

    def packed_hidden(self, prompts_gp, completions_gkt, packed: PackedTokens):
        """See `DecoderFns`."""
        prompts = prompts_gp[:, None]
        positions = _positions(prompts), _positions(completions_gkt, packed.prompt_lengths)
        tokens = packed.pack(prompts, completions_gkt)
        hidden, _, routings = self(tokens, packed.pack(*positions), at=packed)
        return (packed.last_of_prompts(hidden), hidden[:, 0]), routings

    def output_embedding(self):
        """The head, `[v, d]`."""
        # In float32, so that its gradients add up in it, chunk by chunk; `token_logprobs` casts.
        tied = self.config.tie_embeddings
        table = self.embed.embedding[...] if tied else self.head.kernel[...].T
        return self.options.constrain("table", table)

    def _prompts(self, prompts_gp, lengths_g):
        """The prompts alone: their last real hidden state and every layer's keys and values."""
        prompts = prompts_gp[:, None]
        hidden, kvs, routings = self(prompts, _positions(prompts))
        last = jnp.take_along_axis(hidden[:, 0], (lengths_g - 1)[:, None, None], axis=1)[:, 0]
        mask = completion_mask(lengths_g, prompts_gp.shape[1])
        prefix = [kv and Prefix(kv[0][:, 0], kv[1][:, 0], mask) for kv in kvs]
        return last, prefix, routings


@dataclass(frozen=True, eq=False)  # one is like no other, and can be a key
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
        vocabulary_blocks: see `gvpo_jax.logprobs.token_logprobs`.
        logit_cap: of all logits, see `gvpo_jax.logprobs.soft_cap`.
        in_float32: the last names of parameters that are used in float32 whatever the dtype of the
            computation, and so are kept in it.
        stacking: stacks the parameters, or a part of them, by its `stack(params)`, for programs
            that scan over the layers. `packed_hidden`, `completion_hidden` and `head` take them
            stacked too. `unstack` turns gradients back. None: layers are compiled one by one.
        routed: `(name, params, *arrays) -> (result, routing)`: what the function of that name
            gives, and the `gvpo_jax.ops.experts.Routing` of each layer with experts, laid out as
            the tokens that it is given; of "completion_hidden" first the prompts', then the
            completions'. None: there are no experts.
    """

    prefill: Callable[..., Any]
    empty_cache: Callable[..., Any]
    decode: Callable[..., Any]
    completion_hidden: Callable[..., jax.Array]
    head: Callable[[Params], jax.Array]
    shards: int = 1
    chunk_bytes: int = CHUNK_BYTES
    vocabulary_blocks: bool = False
    packed_hidden: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    logit_cap: float | None = None
    in_float32: tuple[str, ...] = ()
    routed: Callable[..., Any] | None = None
    stacking: Stacking | None = None


def decoder_fns(config: DecoderConfig, options: DecoderOptions = PLAIN) -> DecoderFns:
    """The methods of a decoder as functions of its parameters."""
    stacking = stacking_of(config, options.dtype)
    graph = _graph(config, options)
    stacked_graph = _graph(config, options, stacking.places) if options.scan_layers else graph

    def routed(name: str, params: Params, *arrays: Any) -> Any:
        params = options.params(params)
        if STACKED not in params:
            return getattr(nnx.merge(graph, params), name)(*arrays)
        params = {"layers" if key == STACKED else key: x for key, x in params.items()}
        return getattr(nnx.merge(stacked_graph, params), name)(*arrays)

    def without_routing(name: str) -> Callable[..., Any]:
        return lambda params, *arrays: routed(name, params, *arrays)[0]

    return DecoderFns(
        prefill=without_routing("prefill"),
        empty_cache=functools.partial(_empty_cache, config, _cache_dtype(options)),
        decode=without_routing("decode"),
        completion_hidden=without_routing("completion_hidden"),
        head=functools.partial(routed, "output_embedding"),
        shards=options.shards,
        chunk_bytes=options.chunk_bytes,
        vocabulary_blocks=options.vocabulary_blocks,
        packed_hidden=without_routing("packed_hidden"),
        logit_cap=config.final_logit_softcapping,
        in_float32=stacking.in_float32,
        routed=None if config.experts is None else routed,
        stacking=stacking if options.scan_layers else None,
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
    hidden, _, _ = model(tokens_bt[:, None], _positions(tokens_bt[:, None]))
    return soft_cap(hidden[:, 0] @ model.output_embedding().T, config.final_logit_softcapping)


@functools.lru_cache
def _graph(config: DecoderConfig, options: DecoderOptions, places: Places | None = None):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, options, nnx.Rngs(0), places)))[0]


def _with_remat(remat: Remat, *, in_loop: bool = False):
    if remat == "none":
        return Block.__call__
    keep = jax.checkpoint_policies
    dots = keep.save_from_both_policies(
        keep.dots_with_no_batch_dims_saveable, keep.save_only_these_names("product")
    )
    policy = dots if remat == "dots" else None
    return nnx.remat(Block.__call__, policy=policy, prevent_cse=not in_loop)


def _stacked(of_layers: list[Any], width: int) -> list[Any]:
    """Of the layers of several periods, one after another: those of each place in a period."""
    return [
        jax.tree.map(lambda *x: jnp.stack(x), *of_layers[place::width]) for place in range(width)
    ]


def _positions(tokens_gkt, start_g=None):
    """The position of each token, from 0 on or from where its group's completions start."""
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens_gkt.shape, 2)
    return positions if start_g is None else start_g[:, None, None] + positions


def _cache_dtype(options: DecoderOptions):
    return options.dtype if options.cache_dtype is None else options.cache_dtype


def _empty_cache(config, dtype, groups, k, length):
    def empty(layer) -> Stored:
        heads, width = config.heads(layer)
        shape = (groups, k, heads, length, width)
        zeros = jnp.zeros(shape, dtype)
        return Int8(zeros, jnp.zeros(shape[:-1])) if zeros.dtype == jnp.int8 else zeros

    own = [config.source(i) is None for i in range(config.num_layers)]
    return [(empty(i), empty(i)) if own else None for i, own in enumerate(own)]


def _ropes(c: DecoderConfig, positions_gkt) -> list[Any]:
    """Each layer's rotary angles; None: it has no positions."""
    dims = c.rotary_dims or c.full_head_dim or c.head_dim
    everywhere = rotations(positions_gkt, c.rope_theta, c.rope_scaling, dims)
    local = everywhere
    if c.local_rope_theta is not None:
        local = rotations(positions_gkt, c.local_rope_theta, None, c.rotary_dims or c.head_dim)

    def of_layer(i: int):
        if i in c.no_rope_layers:
            return None
        return everywhere if c.window(i) is None else local

    return [of_layer(i) for i in range(c.num_layers)]
