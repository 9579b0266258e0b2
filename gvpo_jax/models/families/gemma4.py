"""Gemma 4, the dense models: Gemma 3 with wider heads in layers that see everything.

Some layers share keys and values; E2B and E4B tell each layer about each token by another table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.families import gemma3
from gvpo_jax.models.families.gemma2 import GEMMA_NAMES
from gvpo_jax.models.family import FULL, SLIDING, Family, alternating, bad


def _layer_types(values: Mapping[str, Any]) -> Sequence[str]:
    return [*alternating(6)(values)[:-1], FULL]


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("enable_moe_block"):
        raise bad("enable_moe_block is not supported: of Gemma 4 only the dense models are")
    if values.get("use_bidirectional_attention") == "all":
        raise bad("use_bidirectional_attention 'all' is not supported")
    if (values.get("layer_types") or [FULL])[-1] != FULL:
        raise bad(f"layer_types must end with {FULL!r}")
    layers, shared = values["num_hidden_layers"], values["num_kv_shared_layers"]
    kinds = values.get("layer_types") or _layer_types(values)
    if not 0 <= shared < layers or set(kinds[: layers - shared]) != set(kinds):
        raise bad(f"num_kv_shared_layers is {shared}: its layers find no keys and values to share")
    if values["vocab_size_per_layer_input"] != values["vocab_size"]:
        raise bad("vocab_size_per_layer_input differs from vocab_size: not supported")
    equal = bool(values["attention_k_eq_v"])
    full = {
        "head_dim": values["global_head_dim"],
        "num_key_value_heads": values.get("num_global_key_value_heads") if equal else None,
    }
    by_layer = values.get("per_layer_config") or {}  # as transformers 5 writes it
    full |= by_layer.get(str(kinds.index(FULL)), {})
    return {
        "embedding_multiplier": values["hidden_size"] ** 0.5,
        "full_head_dim": full["head_dim"],
        "full_kv_heads": full["num_key_value_heads"],
        "keys_as_values": equal,
        "shared_layers": shared,
        "shared_width": 2 if values.get("use_double_wide_mlp") else 1,
        "per_layer_width": values["hidden_size_per_layer_input"] or None,
    }


def _back(config: DecoderConfig) -> dict[str, Any]:
    return {
        "global_head_dim": config.full_head_dim,
        "num_global_key_value_heads": config.full_kv_heads,
        "attention_k_eq_v": config.keys_as_values,
        "num_kv_shared_layers": config.shared_layers,
        "use_double_wide_mlp": config.shared_width == 2,
        "hidden_size_per_layer_input": config.per_layer_width or 0,
        "vocab_size_per_layer_input": config.vocab_size,
    }


def _unread(config: DecoderConfig) -> Sequence[str]:
    """What layers that share keys and values would make their own with."""
    sharing = [i for i in range(config.num_layers) if config.source(i) is not None]
    parts = ("k_proj", "v_proj", "k_norm", "v_norm")
    return [f"model.layers.{i}.self_attn.{part}.weight" for i in sharing for part in parts]


FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    models="Gemma 4 (dense: E2B, E4B, 31B; the language model)",
    constants={
        "norm": "float32",
        "norms": "both",
        "qk_norm": True,
        "value_norm": True,
        "attention_multiplier": 1.0,
        "layer_scalar": True,
    },
    silent={
        **{k: v for k, v in gemma3.FAMILY.silent.items() if not k.startswith("rope")},
        "vocab_size": 262144,
        "num_hidden_layers": 30,
        "sliding_window": 512,
        "global_head_dim": 512,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    numbers={"final_logit_softcapping": "final_logit_softcapping"},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    options=_options,
    back=_back,
    layer_types=_layer_types,
    names={
        **GEMMA_NAMES,
        "out": "layer_scalar",
        "per_layer/gate": "per_layer_input_gate",
        "per_layer/down": "per_layer_projection",
        "per_layer/norm": "post_per_layer_input_norm",
    },
    outer_names={
        "per_layer/embed": "model.embed_tokens_per_layer",
        "per_layer/up": "model.per_layer_model_projection",
        "per_layer/norm": "model.per_layer_projection_norm",
    },
    unread=_unread,
    stop_tokens=("<end_of_turn>", "<turn|>"),
)
