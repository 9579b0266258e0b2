"""config.json <-> `DecoderConfig`; what the decoder does not compute is refused here."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig, RopeScaling

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
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
# What transformers takes where config.json is silent.
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}


def decoder_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        UserError: an unknown architecture, a missing or senseless size, or a setting that the
            decoder does not compute: sliding windows in use, another activation, another rope type,
            quantized weights.
    """
    family = _family(hf_config)
    _refuse_unsupported(hf_config)
    hidden, heads = _size(hf_config, "hidden_size"), _size(hf_config, "num_attention_heads")
    defaults = {
        "num_kv_heads": heads if family == "llama" else None,
        "head_dim": 128 if family == "qwen3" else hidden // heads,
        "max_position_embeddings": _DEFAULT_MAX_POSITIONS[family],
    }
    sizes = {ours: _size(hf_config, key, defaults.get(ours)) for ours, key in _SIZES.items()}
    kv_heads, head_dim = sizes["num_kv_heads"], sizes["head_dim"]
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise UserError(
            f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one"
        )
    theta, scaling = _rope(hf_config, sizes["max_position_embeddings"])
    attention_bias = bool(hf_config.get("attention_bias"))
    return DecoderConfig(
        **sizes,
        family=family,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(hf_config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(hf_config.get("mlp_bias")),
        qk_norm=family == "qwen3",
    )


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder that came without one; `decoder_config` undoes it exactly."""
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
    scaling = config.rope_scaling
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": config.family,
        **{key: getattr(config, ours) for ours, key in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": "llama3", **asdict(scaling)},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.family != "qwen2":
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    return values


def _family(hf_config: Mapping[str, Any]) -> str:
    architectures, model_type = hf_config.get("architectures"), hf_config.get("model_type")
    if not architectures and model_type in ARCHITECTURES.values():
        return str(model_type)
    for architecture, family in ARCHITECTURES.items():
        if architectures == [architecture]:
            return family
    found = architectures or model_type
    raise UserError(
        f"config.json: architecture {found} is not supported; use one of {', '.join(ARCHITECTURES)}"
    )


def _refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    activation = hf_config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
    if hf_config.get("quantization_config"):
        raise UserError(
            "config.json: quantized weights are not supported; "
            "use the model's bfloat16 or float32 weights"
        )
    layer_types = set(hf_config.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise UserError(
            f"config.json: layer_types {sorted(layer_types)} are not supported, "
            "only 'full_attention'"
        )
    if hf_config.get("layer_types") is None and hf_config.get("use_sliding_window"):
        layers = _size(hf_config, "num_hidden_layers")
        unwindowed = hf_config.get("max_window_layers", 28)  # the first so many layers
        if hf_config.get("sliding_window", 4096) and unwindowed < layers:
            raise UserError("config.json: sliding window attention is in use and not supported")


def _rope(hf_config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("config.json: rope parameters per layer type are not supported")
    # transformers looks in rope_parameters first, then at the older key beside it
    theta = rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported, only 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(
            f"config.json: rope type {kind!r} is not supported, only 'default' and 'llama3'"
        )
    original = hf_config.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", max_positions
    )
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [key for key in factors if key not in rope]:
        raise UserError(f"config.json: rope type 'llama3' needs {', '.join(missing)}")
    numbers = {key: float(rope[key]) for key in factors}
    return float(theta), RopeScaling(**numbers, original_max_position_embeddings=int(original))


def _size(hf_config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf_config.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json lacks {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}; it must be a positive integer")
    return value


def check_length(shape: DecoderConfig, length: int, name: str) -> None:
    """Raises UserError where a decoder was not made for sequences of so many tokens."""
    if length > shape.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length = {length} tokens, but "
            f"{name} was made for {shape.max_position_embeddings}; lower one of them"
        )
