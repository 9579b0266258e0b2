"""config.json <-> `DecoderConfig`; what the decoder does not compute is refused here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import FULL, SLIDING, Family, all_families, bad
from gvpo_jax.models.hf_rope import rope_json, rope_options
from gvpo_jax.models.rope import LongRopeScaling

Values = Mapping[str, Any]
# The sizes: our names, and a config.json's.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_LARGEST = 2**40
# What arithmetic and look-ups say of a text, a list or a null in a number's place.
_SENSELESS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def decoder_config(hf_config: Values) -> DecoderConfig:
    """The decoder that a config.json describes; of a multimodal model, its language model.

    Raises:
        UserError: an unknown family, a missing or senseless size, or a setting that the decoder
            does not compute: another activation, another rope type, quantized weights; or a value
            that is not what it should be, such as a text for a number.
    """
    try:
        config = _decoder_config(hf_config)
    except UserError:
        raise
    except _SENSELESS as error:
        raise bad(f"a value is not what it should be: {type(error).__name__}: {error}") from error
    _check_numbers(config)
    return config


def _check_numbers(part: Any) -> None:
    """Raises UserError for what families have read without a look at it."""
    for field in dataclasses.fields(part):
        value, kind = getattr(part, field.name), str(field.type)
        if dataclasses.is_dataclass(value):
            _check_numbers(value)
            continue
        if "Literal" in kind or "str" in kind:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float | None if "float" in kind else int | None):
                raise bad(f"{field.name} is {number!r}")
            if isinstance(number, int | float) and not abs(number) < _LARGEST:
                raise bad(f"{field.name} is {number}, which is no size of a model")


def _decoder_config(hf_config: Values) -> DecoderConfig:
    values = text_values(hf_config)
    family = _family(values)
    values = {**family.silent, **values}
    if values.get("quantization_config"):
        raise bad(
            "quantized weights are not supported; use the model's bfloat16 or float32 weights"
        )
    sizes = _sizes(values)
    options: dict[str, Any] = {
        "rms_norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "activation": _activation(values, family),
        "windows": _windows(values, family),
        **{ours: bool(values.get(key)) for ours, key in family.flags.items()},
        **{ours: _number(values, key) for ours, key in family.numbers.items()},
        **family.constants,
        **rope_options(values, family, sizes["head_dim"]),
    }
    return DecoderConfig(family.model_type, **sizes, **options | family.options(values))


def text_values(hf_config: Values) -> dict[str, Any]:
    """A config.json's own values or, of a multimodal model, those of its language model.

    Raises:
        UserError: the language model is of a family that is not supported.
    """
    text = hf_config.get("text_config")
    if not isinstance(text, Mapping):
        return dict(hf_config)
    family = all_families().get(text.get("model_type", ""))
    if family is None:
        whole = (hf_config.get("architectures") or [hf_config.get("model_type")])[0]
        raise bad(
            f"{whole} is multimodal, and its language model, {text.get('model_type')!r}, is not "
            f"supported; supported are {_supported()}"
        )
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
    shared = {key: hf_config[key] for key in kept if hf_config.get(key) is not None}
    return {**text, **shared, "architectures": [family.architecture]}


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder that came without one; `decoder_config` undoes it exactly."""
    family = all_families()[config.family]
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "swish"}
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(config, ours) for ours, key in _SIZES.items()},
        family.activation_key: names[config.activation],
        "rms_norm_eps": config.rms_norm_eps,
        **rope_json(config.rope_theta, config.rope_scaling, config.local_rope_theta),
        "tie_word_embeddings": config.tie_embeddings,
        **{key: getattr(config, ours) for ours, key in {**family.flags, **family.numbers}.items()},
        **family.back(config),
    }
    if config.rotary_dims is not None:
        values["partial_rotary_factor"] = config.rotary_dims / config.head_dim
    if family.layer_types is not None:
        values |= _windows_json(config, family, values)
    return values


def check_length(longest: int, length: int, name: str) -> None:
    """Raises UserError where a model was not made for sequences of so many tokens."""
    if length > longest:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length = {length} tokens, but "
            f"{name} was made for {longest}; lower one of them"
        )


def for_length(shape: DecoderConfig, length: int) -> DecoderConfig:
    """The decoder for sequences of so many tokens: LongRoPE has other factors for long ones."""
    if not isinstance(shape.rope_scaling, LongRopeScaling):
        return shape
    return dataclasses.replace(shape, rope_scaling=shape.rope_scaling.of_length(length))


def _supported() -> str:
    return ", ".join(all_families())


def _family(values: Values) -> Family:
    """By the model type, as transformers does; by the architecture where none is given."""
    families, architectures = all_families(), values.get("architectures")
    model_type = values.get("model_type")
    if model_type is None:
        for family in families.values():
            if architectures == [family.architecture]:
                return family
        found = (
            f", and architecture {' '.join(architectures)} is not supported"
            if architectures
            else ""
        )
        raise bad(f"there is no model_type{found}; supported are {_supported()}")
    if model_type not in families:
        raise bad(f"model_type {model_type} is not supported; supported are {_supported()}")
    family = families[model_type]
    if architectures and architectures != [family.architecture]:
        raise bad(
            f"architectures {' '.join(architectures)} of model_type {model_type} is not supported, "
            f"only {family.architecture}"
        )
    return family


def _activation(values: Values, family: Family) -> str:
    key = family.activation_key
    name = values.get(key) or family.silent.get(key, "silu")
    if name not in _ACTIVATIONS:
        known = ", ".join(repr(activation) for activation in _ACTIVATIONS)
        raise bad(f"{key} {name!r} is not supported, only {known}")
    return _ACTIVATIONS[name]


def _windows(values: Values, family: Family) -> tuple[int | None, ...]:
    """Of each layer; empty where none has one."""
    layers, listed = values["num_hidden_layers"], values.get("layer_types")
    kinds = listed or (family.layer_types(values) if family.layer_types else [FULL] * layers)
    allowed = {FULL} if family.layer_types is None else {FULL, SLIDING}
    if unknown := sorted(set(kinds) - allowed):
        raise bad(f"layer_types {unknown} are not supported, only {sorted(allowed)}")
    if len(kinds) != layers:
        raise bad(f"layer_types lists {len(kinds)} layers, num_hidden_layers is {layers}")
    if SLIDING not in kinds:
        if values.get("use_sliding_window") and family.layer_types is None:
            raise bad("sliding window attention is in use and not supported")
        return ()
    window = values.get("sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise bad(f"sliding_window is {window!r}; layers that have one need a positive integer")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _windows_json(config: DecoderConfig, family: Family, values: Values) -> dict[str, Any]:
    kinds = [SLIDING if config.window(i) else FULL for i in range(config.num_layers)]
    window = next((window for window in config.windows if window), None)
    new: dict[str, Any] = {}
    if window or family.silent.get("sliding_window"):
        new["sliding_window"] = window
    assert family.layer_types is not None
    if list(family.layer_types({**family.silent, **values, **new})) != kinds:
        new["layer_types"] = kinds
    return new


def _sizes(values: Values) -> dict[str, int]:
    hidden, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
    defaults = {"num_kv_heads": heads, "head_dim": hidden // heads}
    sizes = {ours: _size(values, key, defaults.get(ours)) for ours, key in _SIZES.items()}
    if heads % sizes["num_kv_heads"]:
        raise bad(
            f"num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {sizes['num_kv_heads']}"
        )
    if sizes["head_dim"] % 2:
        raise bad(f"head_dim {sizes['head_dim']} is odd; rotary embeddings need an even one")
    return sizes


def _size(values: Values, key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json lacks {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise bad(f"{key} is {value!r}; it must be a positive integer")
    return value


def _number(values: Values, key: str) -> float | None:
    value = values.get(key)
    return None if value is None else float(value)
