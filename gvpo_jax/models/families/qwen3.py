"""Qwen3: queries and keys are normed, head by head."""

from gvpo_jax.models.family import Family, above_max_window_layers

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    models="Qwen3 (dense)",
    constants={"qk_norm": True},
    silent={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    layer_types=above_max_window_layers,
    gguf="qwen3",
)
