"""The rotary positions of a config.json, in the older and the newer spelling, and back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from gvpo_jax.models.family import FULL, SLIDING, Family, bad
from gvpo_jax.models.rope import (
    LinearScaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    Scaling,
    YarnScaling,
)

Values = Mapping[str, Any]
_KINDS = {
    RopeScaling: "llama3",
    LinearScaling: "linear",
    ProportionalScaling: "proportional",
    YarnScaling: "yarn",
    LongRopeScaling: "longrope",
}


def rope_options(values: Values, family: Family, head_dim: int) -> dict[str, Any]:
    """The options of `DecoderConfig` that are about rotary positions.

    Raises:
        UserError: a kind of scaling that the decoder does not compute, or one that lacks a number.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    everywhere, options = given, {}
    if any(isinstance(value, dict) for value in given.values()):
        if family.layer_types is None:
            raise bad("rope parameters per layer type are not supported")
        everywhere, local = given.get(FULL) or {}, given.get(SLIDING) or {}
        if (kind := _kind(local)) != "default":
            raise bad(f"rope type {kind!r} of {SLIDING} is not supported, only 'default'")
        if "rope_theta" in local:
            options["local_rope_theta"] = float(local["rope_theta"])
    # transformers looks in rope_parameters first, then at the older key beside it
    theta = everywhere.get("rope_theta", values.get("rope_theta", 10000.0))
    dims = _rotary_dims(everywhere, values, family, head_dim)
    return options | {
        "rope_theta": float(theta),
        "rope_scaling": _scaling(everywhere, values),
        "rotary_dims": None if dims == head_dim else dims,
    }


def rope_json(
    theta: float, scaling: Scaling | None, local_theta: float | None = None
) -> dict[str, Any]:
    """The keys of a config.json that `rope_options` undoes."""
    entry = None
    if scaling is not None:
        numbers = {k: v for k, v in asdict(scaling).items() if k != "in_use"}
        numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}
        entry = {"rope_type": _KINDS[type(scaling)], **numbers}
    if local_theta is None:
        return {"rope_theta": theta, "rope_scaling": entry}
    everywhere = {"rope_type": "default", **(entry or {}), "rope_theta": theta}
    local = {"rope_type": "default", "rope_theta": local_theta}
    return {"rope_parameters": {FULL: everywhere, SLIDING: local}}


def older_rope(values: Values) -> dict[str, Any]:
    """Rotary positions in the keys of transformers before 5, where config.json has the newer one.

    Those versions refuse a LongRoPE with more than three keys.
    """
    given = values.get("rope_parameters")
    if not given:
        return {}
    everywhere, local = given, {}
    if any(isinstance(value, dict) for value in given.values()):
        everywhere, local = given.get(FULL) or {}, given.get(SLIDING) or {}
    kind, theta = _kind(everywhere), everywhere.get("rope_theta", 10000.0)
    if kind == "proportional":  # no such version has models with it
        return {}
    scaling = everywhere if kind != "default" else None
    if kind == "longrope" and not {"factor", "attention_factor"} & everywhere.keys():
        factors = {key: everywhere[key] for key in ("short_factor", "long_factor")}
        scaling = {"type": "longrope", **factors}
    older = {"rope_theta": theta, "rope_scaling": scaling}
    if (part := everywhere.get("partial_rotary_factor", 1)) != 1:
        older["partial_rotary_factor"] = part
    if "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
    return older


def _kind(rope: Values) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "longrope" if kind == "su" else str(kind)  # an early name in Phi-3's files


def _rotary_dims(rope: Values, values: Values, family: Family, head_dim: int) -> int:
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if part in (None, 1, 1.0) or _kind(rope) == "proportional":
        return head_dim
    if "partial_rotary_factor" not in family.silent:
        raise bad(f"partial_rotary_factor {part} is not supported, only 1")
    dims = int(head_dim * part)
    if dims < 2 or dims % 2:
        raise bad(f"partial_rotary_factor {part} of head_dim {head_dim} leaves {dims}: no even one")
    return dims


def _scaling(rope: Values, values: Values) -> Scaling | None:
    kind = _kind(rope)
    if kind == "default":
        return None
    if kind not in _READERS:
        known = ", ".join(repr(name) for name in ("default", *_READERS))
        raise bad(f"rope type {kind!r} is not supported, only {known}")
    needed, read = _READERS[kind]
    if missing := [key for key in needed if rope.get(key) is None]:
        raise bad(f"rope type {kind!r} needs {', '.join(missing)}")
    original = values.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", values["max_position_embeddings"]
    )
    return read(rope, int(original), values["max_position_embeddings"])


def _llama3(rope: Values, original: int, longest: int) -> Scaling:
    numbers = {key: float(rope[key]) for key in _READERS["llama3"][0]}
    return RopeScaling(**numbers, original_max_position_embeddings=original)


def _linear(rope: Values, original: int, longest: int) -> Scaling:
    return LinearScaling(float(rope["factor"]))


def _proportional(rope: Values, original: int, longest: int) -> Scaling:
    return ProportionalScaling(
        float(rope.get("factor") or 1), float(rope.get("partial_rotary_factor", 1))
    )


def _yarn(rope: Values, original: int, longest: int) -> Scaling:
    factor = float(rope.get("factor") or longest / original)

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    attention = rope.get("attention_factor")
    if attention is None:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = growth(above) / growth(below) if above and below else growth(1)
    return YarnScaling(
        factor,
        original,
        float(attention),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        llama_4_scaling_beta=rope.get("llama_4_scaling_beta"),
    )


def _longrope(rope: Values, original: int, longest: int) -> Scaling:
    factor = float(rope.get("factor") or longest / original)
    attention = rope.get("attention_factor")
    if attention is None:
        grown = 1 + math.log(factor) / math.log(original)
        attention = math.sqrt(grown) if factor > 1 else 1.0
    short, long = (tuple(map(float, rope[key])) for key in ("short_factor", "long_factor"))
    return LongRopeScaling(short, long, original, float(attention))


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Values, int, int], Scaling]]] = {
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _llama3),
    "linear": (("factor",), _linear),
    "proportional": ((), _proportional),
    "yarn": ((), _yarn),
    "longrope": (("short_factor", "long_factor"), _longrope),
}
