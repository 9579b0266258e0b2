"""Qwen2-MoE: Qwen2 with a mixture of experts, beside which every token has a shared one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.families import qwen3_moe
from gvpo_jax.models.family import FULL, NAMES, SLIDING


def _layer_types(values: Mapping[str, Any]) -> Sequence[str]:
    used = values.get("use_sliding_window") and values.get("sliding_window") is not None
    first = values.get("max_window_layers", 28)
    layers = range(values["num_hidden_layers"])
    return [SLIDING if used and i < first and i % 2 == 0 else FULL for i in layers]


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    experts = qwen3_moe.FAMILY.options(values)["experts"]
    shared = values["shared_expert_intermediate_size"]
    return {"experts": dataclasses.replace(experts, shared_size=shared)}


def _back(config: DecoderConfig) -> dict[str, Any]:
    assert config.experts is not None
    shared = {"shared_expert_intermediate_size": config.experts.shared_size}
    return qwen3_moe.FAMILY.back(config) | shared


FAMILY = dataclasses.replace(
    qwen3_moe.FAMILY,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    constants={},
    silent={
        **qwen3_moe.FAMILY.silent,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    flags={"qkv_bias": "qkv_bias"},
    options=_options,
    back=_back,
    layer_types=_layer_types,
    names=NAMES
    | {
        "mlp/shared/gate": "mlp.shared_expert.gate_proj",
        "mlp/shared/up": "mlp.shared_expert.up_proj",
        "mlp/shared/down": "mlp.shared_expert.down_proj",
        "mlp/shared_gate": "mlp.shared_expert_gate",
    },
    gguf="qwen2moe",
)
