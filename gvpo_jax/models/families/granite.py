"""Granite: Llama with four multipliers: of embedding, scores, what layers add, and logits."""

from gvpo_jax.models.family import Family

_MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)

FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    models="Granite 3.x (dense)",
    silent={"max_position_embeddings": 2048, **dict.fromkeys(_MULTIPLIERS, 1.0)},
    numbers={name: name for name in _MULTIPLIERS},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
)
