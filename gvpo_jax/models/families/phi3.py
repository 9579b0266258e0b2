"""Phi-3 and Phi-4: fused projections, rotary positions of a part of each head, LongRoPE."""

from collections.abc import Mapping
from typing import Any

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import NAMES, Family, all_sliding, bad
from gvpo_jax.models.rope import LongRopeScaling


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """None of its own, but what Phi-3's files call yarn is no YaRN."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn":
        raise bad("rope type 'yarn' of Phi-3 is an early name of another: write 'longrope'")
    return {}


def _back(config: DecoderConfig) -> dict[str, Any]:
    if not isinstance(config.rope_scaling, LongRopeScaling):
        return {}
    key = "original_max_position_embeddings"
    return {key: config.rope_scaling.original_max_position_embeddings}


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    models="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    silent={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
    },
    options=_options,
    back=_back,
    layer_types=all_sliding,
    names=NAMES
    | {
        "attn/q": "self_attn.qkv_proj",
        "attn/k": "self_attn.qkv_proj",
        "attn/v": "self_attn.qkv_proj",
        "mlp/gate": "mlp.gate_up_proj",
        "mlp/up": "mlp.gate_up_proj",
    },
)
