"""SmolLM3: every fourth layer has no positions; windows, if any, are there."""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import FULL, SLIDING, Family, bad


def _rotates(values: Mapping[str, Any]) -> Sequence[bool]:
    """Which layers have rotary positions; no_rope_layers has a 1 for those that do."""
    layers, listed = values["num_hidden_layers"], values.get("no_rope_layers")
    if listed is None:
        every = values["no_rope_layer_interval"]
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(listed) != layers:
        raise bad(f"no_rope_layers lists {len(listed)} layers, num_hidden_layers is {layers}")
    return [bool(rotates) for rotates in listed]


def _layer_types(values: Mapping[str, Any]) -> Sequence[str]:
    used = values.get("use_sliding_window") and values.get("sliding_window") is not None
    return [SLIDING if used and not rotates else FULL for rotates in _rotates(values)]


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    without = [i for i, rotates in enumerate(_rotates(values)) if not rotates]
    return {"no_rope_layers": tuple(without)}


def _back(config: DecoderConfig) -> dict[str, Any]:
    rotates = [int(i not in config.no_rope_layers) for i in range(config.num_layers)]
    return {"no_rope_layers": rotates, "use_sliding_window": bool(config.windows)}


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    models="SmolLM3 3B",
    silent={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    options=_options,
    back=_back,
    layer_types=_layer_types,
)
