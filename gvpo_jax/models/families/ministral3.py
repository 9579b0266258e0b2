"""Ministral 3: Mistral with YaRN, and queries that grow with their position."""

import dataclasses

from gvpo_jax.models.families import mistral

FAMILY = dataclasses.replace(
    mistral.FAMILY,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    silent={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
)
