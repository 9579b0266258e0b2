"""What a decoder computes, and how: its shape with the options of its blocks, and its means."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gvpo_jax.logprobs import CHUNK_BYTES
from gvpo_jax.models.lora import Lora
from gvpo_jax.models.rope import Scaling
from gvpo_jax.ops.attention import causal
from gvpo_jax.ops.experts import of_tokens

Params = dict[str, Any]
Remat = Literal["none", "dots", "layer"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward layers.

    Attributes:
        count: of experts in a layer.
        per_token: how many of them a token goes through, those that its router finds most likely.
        intermediate_size: of one.
        normalised: whether a token's shares add up to 1; else they are the router's probabilities.
        dense_layers: numbers of the layers that have a feed-forward layer all the same.
        shared_size: inner width of an expert that every token goes through besides; its result is
            multiplied by the sigmoid of a gate. None: there is none.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool
    dense_layers: tuple[int, ...] = ()
    shared_size: int | None = None

    @property
    def width(self) -> int:
        """Features inside all experts of a token."""
        return self.per_token * self.intermediate_size + (self.shared_size or 0)


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder, under a transformers config's names where it has them.

    Attributes:
        qk_norm_over: a norm of queries and keys sees a head, or all heads together.
        norm: what a norm multiplies by: the weight after rounding to the computation's dtype, the
            weight in float32, or one plus the weight in float32.
        norms: where they stand: before attention and feed-forward layer, after them, or both.
        windows: for each layer how many positions a token sees, itself included; None: all before
            it. Empty: all layers see everything.
        local_rope_theta: the rotary base of layers with a window, unscaled; None: as the others.
        no_rope_layers: numbers of the layers without rotary positions.
        rotary_dims: of a head, how many rotate; None: all.
        attention_multiplier: of scores; None: 1/sqrt(head_dim).
        attn_logit_softcapping, final_logit_softcapping: scores or logits x become c*tanh(x/c).
        embedding_multiplier: of the embedding, rounded to the computation's dtype.
        residual_multiplier: of what a layer adds.
        logits_scaling: what logits are divided by.
        experts: a mixture of them; None: feed-forward layers.
        full_head_dim, full_kv_heads: of layers without a window, where theirs are others.
        keys_as_values: layers without a window have no projection to values but take their keys.
        value_norm: values are normed, without a weight.
        shared_layers: so many last layers have no keys and values of their own. Each attends to
            those of the last layer before them all that has a window if it has one.
        shared_width: of their feed-forward layers, in multiples of intermediate_size.
        per_layer_width: of what each layer is told about its token by a table of its own.
        layer_scalar: what a layer gives is multiplied by a number from its file, not trained.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 32_768
    qk_norm_over: Literal["head", "width"] = "head"
    norm: Literal["rounded", "float32", "one_plus"] = "rounded"
    norms: Literal["before", "after", "both"] = "before"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    windows: tuple[int | None, ...] = ()
    local_rope_theta: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    rotary_dims: int | None = None
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None
    logits_scaling: float | None = None
    experts: Experts | None = None
    full_head_dim: int | None = None
    full_kv_heads: int | None = None
    keys_as_values: bool = False
    value_norm: bool = False
    shared_layers: int = 0
    shared_width: int = 1
    per_layer_width: int | None = None
    layer_scalar: bool = False

    @property
    def inner_width(self) -> int:
        """Features inside a feed-forward layer, or inside all experts of a token."""
        return self.experts.width if self.experts else self.intermediate_size

    def heads(self, layer: int) -> tuple[int, int]:
        """How many key-value heads this layer has, and their width."""
        if self.window(layer) is not None:
            return self.num_kv_heads, self.head_dim
        return self.full_kv_heads or self.num_kv_heads, self.full_head_dim or self.head_dim

    def source(self, layer: int) -> int | None:
        """The layer whose keys and values this one attends to; None: its own."""
        own = self.num_layers - self.shared_layers
        if layer < own:
            return None
        local = self.window(layer) is not None
        return max(i for i in range(own) if (self.window(i) is not None) == local)

    def window(self, layer: int) -> int | None:
        """Of this layer; None: it sees everything before a token."""
        return self.windows[layer] if self.windows else None


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
        experts: see `gvpo_jax.ops.experts.of_tokens`.
        product: `jax.lax.dot_general` of activations and a layer's weights; one with a gradient of
            its own gives what it returns the `checkpoint_name` "product".
        chunk_bytes, vocabulary_blocks, shards: see `decoder.DecoderFns`.
        lora: the form of the adapter that the parameters hold beside the model's; None: they don't.
        scan_layers: whether scoring and updates scan over stacked layers, see `models.stacking`.
    """

    dtype: Any = jnp.float32
    remat: Remat = "none"
    cache_dtype: Any = None
    constrain: Callable[[str, jax.Array], jax.Array] = lambda name, x: x
    params: Callable[[Params], Params] = lambda params: params
    attention: Callable[..., jax.Array] = causal
    experts: Callable[..., jax.Array] = of_tokens
    product: Callable[..., jax.Array] = jax.lax.dot_general
    chunk_bytes: int = CHUNK_BYTES
    vocabulary_blocks: bool = False
    shards: int = 1
    lora: Lora | None = None
    scan_layers: bool = False


PLAIN = DecoderOptions()
