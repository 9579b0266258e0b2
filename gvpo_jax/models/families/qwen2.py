"""Qwen2: queries, keys and values have biases."""

from gvpo_jax.models.family import Family, above_max_window_layers

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5, Qwen2.5-Math, Qwen2.5-Coder, DeepSeek-R1-Distill-Qwen",
    constants={"qkv_bias": True},
    silent={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    layer_types=above_max_window_layers,
    gguf="qwen2",
)
