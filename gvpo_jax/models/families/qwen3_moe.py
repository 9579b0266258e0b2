"""Qwen3-MoE: Qwen3 with a mixture of experts in place of most feed-forward layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.families import qwen3
from gvpo_jax.models.family import FULL, all_sliding, bad
from gvpo_jax.models.shape import Experts


def _layer_types(values: Mapping[str, Any]) -> Sequence[str]:
    if values.get("use_sliding_window"):
        return all_sliding(values)
    return [FULL] * values["num_hidden_layers"]


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture; transformers 5 writes the number of experts under another name."""
    count = values.get("num_local_experts") or values["num_experts"]
    if not 1 <= values["num_experts_per_tok"] <= count:
        raise bad(f"num_experts_per_tok {values['num_experts_per_tok']} is not of 1 to {count}")
    every, only = values["decoder_sparse_step"], values.get("mlp_only_layers") or ()
    layers = range(values["num_hidden_layers"])
    experts = Experts(
        count,
        values["num_experts_per_tok"],
        values["moe_intermediate_size"],
        normalised=bool(values["norm_topk_prob"]),
        dense_layers=tuple(i for i in layers if i in only or (i + 1) % every),
    )
    return {"experts": experts}


def _back(config: DecoderConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.intermediate_size,
        "norm_topk_prob": config.experts.normalised,
        "mlp_only_layers": list(config.experts.dense_layers),
        "use_sliding_window": bool(config.windows),
    }


FAMILY = dataclasses.replace(
    qwen3.FAMILY,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    silent={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    options=_options,
    back=_back,
    layer_types=_layer_types,
    gguf="qwen3moe",
)
