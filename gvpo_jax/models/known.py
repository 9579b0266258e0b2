"""The shape of a model from its name, without reading or downloading its weights."""

import json
from pathlib import Path
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_config
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.gguf import read_gguf
from gvpo_jax.models.hf_config import decoder_config
from gvpo_jax.models.load import _PACKAGE, _package_path

_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}

# Under the names and with the values of each model's config.json on the Hugging Face hub.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Math-7B": _QWEN2
    | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-Math-1.5B": _QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "Qwen/Qwen2.5-0.5B": _QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}


def model_shape(name: str, config_file: str | None = None) -> DecoderConfig:
    """The decoder of a model that `load_model` would load under this name.

    Args:
        name: as for `load_model`; a name on the hub must be one of `KNOWN`, with or without its
            owner and an ending `-Instruct`.
        config_file: a config.json to take in place of the name, or the folder that holds one.

    Raises UserError when there is no such file, or the hub's name is not known.
    """
    if config_file is not None:
        return _read(Path(config_file).expanduser())
    if name == "debug":
        return debug_config()
    path = _package_path(name) if name.startswith(_PACKAGE) else Path(name).expanduser()
    if path.suffix == ".gguf":
        return read_gguf(path).config
    if path.is_dir() or name.startswith((".", "/", "~")):
        return _read(path)
    wanted = name.removesuffix("-Instruct").split("/")[-1]
    for known, values in KNOWN.items():
        if known.split("/")[-1] == wanted:
            return decoder_config(values)
    raise UserError(
        f"the shape of {name} is not known here: give its config.json with --model-config FILE, or "
        f"use one of {', '.join(KNOWN)}"
    )


def _read(path: Path) -> DecoderConfig:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"there is no file {file}") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object")
    return decoder_config(values)
