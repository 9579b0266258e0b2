"""OLMo 3: OLMo 2 where three of four layers have a window, and these an unscaled rotary base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gvpo_jax.models.families import olmo2
from gvpo_jax.models.family import SLIDING, alternating


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    given = values.get("rope_parameters") or {}
    local = given.get(SLIDING) or {}
    return {"local_rope_theta": float(local.get("rope_theta", values["rope_theta"]))}


FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    silent={**olmo2.FAMILY.silent, "sliding_window": 4096, "rope_theta": 500000.0},
    options=_options,
    layer_types=alternating(4),
)
