"""Gemma 2: soft caps, norms before and after each layer, every second layer with a window."""

from collections.abc import Mapping
from typing import Any

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import NAMES, Family, alternating, bad

GEMMA_NAMES = NAMES | {
    "attn_out_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
GEMMA_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def gemma_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The two multipliers: of the embedding by its width, of scores by a number of its own."""
    if values.get("use_bidirectional_attention"):
        raise bad("use_bidirectional_attention is not supported: completions are sampled in order")
    return {
        "embedding_multiplier": values["hidden_size"] ** 0.5,
        "attention_multiplier": values["query_pre_attn_scalar"] ** -0.5,
    }


def gemma_back(config: DecoderConfig) -> dict[str, Any]:
    """The inverse."""
    assert config.attention_multiplier is not None
    return {"query_pre_attn_scalar": round(config.attention_multiplier**-2, 6)}


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    models="Gemma 2 (2B, 9B, 27B)",
    constants={"norm": "one_plus", "norms": "both"},
    silent={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    numbers=GEMMA_CAPS,
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    options=gemma_options,
    back=gemma_back,
    layer_types=alternating(2),
    names=GEMMA_NAMES,
    stop_tokens=("<end_of_turn>",),
)
