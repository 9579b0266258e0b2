"""Mistral: all layers may have a sliding window."""

from gvpo_jax.models.family import Family, all_sliding

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    models="Mistral 7B, Nemo and Small 3, Ministral 8B and 3 (the language model)",
    silent={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    layer_types=all_sliding,
)
