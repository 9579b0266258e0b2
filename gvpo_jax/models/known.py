"""The shape of a model from its name, without reading or downloading its weights."""

import os
from pathlib import Path
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_config
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.gguf import read_gguf
from gvpo_jax.models.hf_config import decoder_config
from gvpo_jax.models.hf_files import read_json
from gvpo_jax.models.load import local_path

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
)


def _known(
    model_type: str, *sizes: float, eps: float = 1e-6, tied: bool = True, **others: Any
) -> dict[str, Any]:
    others |= {"model_type": model_type, "rms_norm_eps": eps, "tie_word_embeddings": tied}
    return dict(zip(_SIZES, sizes, strict=True)) | others


# Under the names and with the values of each model's config.json on the Hugging Face hub.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Math-7B": _known("qwen2", 152064, 3584, 18944, 28, 28, 4, 4096, 1e4, tied=False),
    "Qwen/Qwen2.5-Math-1.5B": _known("qwen2", 151936, 1536, 8960, 28, 12, 2, 4096, 1e4),
    "Qwen/Qwen2.5-0.5B": _known("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, 1e6),
    "Qwen/Qwen3-0.6B": _known("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, 1e6, head_dim=128),
    "Qwen/Qwen3-1.7B": _known("qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, 1e6, head_dim=128),
    "Qwen/Qwen3-30B-A3B": _known(
        "qwen3_moe",
        151936,
        2048,
        6144,
        48,
        32,
        4,
        40960,
        1e6,
        tied=False,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "google/gemma-3-270m": _known(
        "gemma3_text",
        262144,
        640,
        2048,
        18,
        4,
        1,
        32768,
        1e6,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
    ),
    "google/gemma-3-1b": _known(
        "gemma3_text",
        262144,
        1152,
        6912,
        26,
        4,
        1,
        32768,
        1e6,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
    ),
    "HuggingFaceTB/SmolLM2-135M": _known("llama", 49152, 576, 1536, 30, 9, 3, 8192, 1e5, eps=1e-5),
}


def model_shape(name: str, config_file: str | None = None) -> DecoderConfig:
    """The decoder of a model that `load_model` would load under this name.

    Args:
        name: as for `load_model`; a name on the hub must be one of `KNOWN`, with or without its
            owner and an ending `-Instruct` or `-it`.
        config_file: a config.json to take in place of the name, or the folder that holds one.

    Raises:
        UserError: there is no such file, or the hub's name is not known.
    """
    if config_file is not None:
        return _read(Path(config_file).expanduser())
    if name == "debug":
        return debug_config()
    if (path := local_path(name)) is not None:
        return read_gguf(path).config if path.suffix == ".gguf" else _read(path)
    wanted = name.removesuffix("-Instruct").removesuffix("-it").split("/")[-1]
    for known, values in KNOWN.items():
        if known.split("/")[-1] == wanted:
            return decoder_config(values)
    raise UserError(
        f"the shape of {name} is not known here: give its config.json with --model-config FILE, or "
        f"use one of {', '.join(KNOWN)}"
    )


def _read(path: Path) -> DecoderConfig:
    file = path / "config.json" if os.path.isdir(path) else path
    values = read_json(file)
    if values is None:
        raise UserError(f"there is no file {file}")
    return decoder_config(values)
