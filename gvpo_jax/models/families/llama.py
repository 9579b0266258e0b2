"""Llama: what all others are told apart from."""

from gvpo_jax.models.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    models="Llama 2 and 3.x, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama",
    silent={"max_position_embeddings": 2048},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    gguf="llama",
)
