"""Gemma 3: Gemma 2 with normed queries and keys, two rotary bases, five of six layers local.

From 4B on checkpoints are multimodal: `hf_config.text_values` finds the language model in them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_jax.models.families import gemma2
from gvpo_jax.models.family import alternating


def _layer_types(values: Mapping[str, Any]) -> Sequence[str]:
    return alternating(values["sliding_window_pattern"])(values)


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    options = gemma2.gemma_options(values)
    given = values.get("rope_parameters") or {}
    local = given.get("sliding_attention") or {}
    base = local.get("rope_theta", values["rope_local_base_freq"])
    return options | {"local_rope_theta": float(base)}


FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    models="Gemma 3 (270M, 1B; of 4B, 12B and 27B the language model)",
    constants={**gemma2.FAMILY.constants, "qk_norm": True},
    silent={
        **gemma2.FAMILY.silent,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    options=_options,
    layer_types=_layer_types,
    gguf="gemma3",
)
