"""Reading a .gguf file: config, weights and tokenizer, all from the one file or its parts.

llama.cpp keeps Hugging Face's numbers under other names, except that it reorders the rows of a
Llama's q and k for its own rotary layout. Quantized weights are expanded to float32 with NumPy.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import all_families
from gvpo_jax.models.gguf_tokenizer import build_tokenizer, end_token_ids
from gvpo_jax.models.hf_config import config_json, decoder_config
from gvpo_jax.models.hf_files import ModelFiles, check_fetched
from gvpo_jax.models.hf_tensors import TensorSource

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    # after blk.N., and model.layers.N.
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> ModelFiles:
    """Config, tensors and tokenizer of a .gguf file.

    path: the file; of a model in several files, NAME-00001-of-0000N.gguf, any one.

    Raises:
        UserError: a missing `gguf` package, a broken or missing file, and anything in it that the
            decoder or the tokenizer does not support.
    """
    readers = [_open(part) for part in _parts(path)]
    metadata = {name: field.contents() for name, field in readers[0].fields.items()}
    if metadata.get("split.count", 1) not in (0, len(readers)):
        raise UserError(
            f"{path} is one of {metadata['split.count']} files of a model; name them as they were, "
            "NAME-00001-of-0000N.gguf, in one folder"
        )
    every = [tensor for reader in readers for tensor in reader.tensors]
    tensors = {_hf_name(tensor.name): tensor for tensor in every}
    if len(tensors) < len(every):
        raise UserError(f"{path}: a tensor is there twice; its files are of different models")
    config = _config(path, metadata, tensors)
    tokenizer = build_tokenizer(str(path), metadata, config.max_position_embeddings)
    ends = end_token_ids(metadata)
    values = config_json(config) | {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return ModelFiles(config, values, _source(path, config, tensors), tokenizer)


def _parts(path: Path) -> list[Path]:
    """The model's files in their order; each is there."""
    name = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    parts = [path]
    if name:
        numbers = range(1, int(name[2]) + 1)
        parts = [path.with_name(f"{name[1]}-{i:05d}-of-{name[2]}.gguf") for i in numbers]
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part} does not exist")
    return parts


def _open(path: Path) -> Any:
    check_fetched(path)
    try:
        import gguf
    except ImportError as error:
        raise UserError('reading .gguf files needs: pip install "gvpo-jax[gguf]"') from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a whole .gguf file: {error}") from error


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> DecoderConfig:
    family = metadata.get("general.architecture")
    known = [family.gguf for family in all_families().values() if family.gguf]
    if family not in known:
        known = ", ".join(known)
        raise UserError(f"{path}: architecture {family!r} is not supported, only {known}")

    def get(key: str) -> Any:
        return metadata.get(f"{family}.{key}")

    _refuse_unsupported(path, get, tensors)
    hidden, heads = get("embedding_length"), get("attention.head_count")
    values = {
        "model_type": family,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())) or None,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv") or heads,
        "head_dim": get("attention.key_length") or (hidden // heads if hidden and heads else None),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon") or 1e-6),
        "rope_theta": _shortest(get("rope.freq_base") or 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": family != "qwen2" and "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
    }
    try:
        return decoder_config(values)
    except UserError as error:
        raise UserError(str(error).replace("config.json", f"{path} (as config.json)", 1)) from error


def _refuse_unsupported(path: Path, get: Callable[[str], Any], tensors: Mapping[str, Any]) -> None:
    if get("rope.scaling.type") not in (None, "none") or "rope_freqs.weight" in tensors:
        raise UserError(
            f"{path}: scaled rotary embeddings are not read from .gguf files; "
            "load the model's safetensors folder instead"
        )
    if get("attention.sliding_window"):
        raise UserError(f"{path}: sliding window attention is not supported")
    if get("expert_count"):
        raise UserError(f"{path}: mixtures of experts are not supported")
    rotated, width = get("rope.dimension_count"), get("attention.key_length")
    if rotated and width and rotated != width:
        raise UserError(f"{path}: only {rotated} of {width} head dimensions rotate: not supported")


def _source(path: Path, config: DecoderConfig, tensors: Mapping[str, Any]) -> TensorSource:
    import gguf

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: weights of type {kind} cannot be read") from error
        for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            if config.family == "llama" and f".self_attn.{part}_proj." in name:
                array = _unpermute(array, heads)
        return np.asarray(array, np.float32)

    # GGUF lists the innermost axis first
    shapes = {name: tuple(tensor.shape[::-1].tolist()) for name, tensor in tensors.items()}
    return TensorSource(str(path), shapes, read)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's order of rows, pairs side by side, to Hugging Face's, halves."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _hf_name(name: str) -> str:
    """The Hugging Face name; a name that has none stays, to be reported as unexpected."""
    found = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in _NAMES:
        return name
    layer, part, kind = found.groups("")
    return f"{layer.replace('blk', 'model.layers')}{_NAMES[part]}.{kind}"


def _shortest(value: float) -> float:
    # stored as float32: 9.999999747378752e-06 was written as 1e-05
    return float(str(np.float32(value)))
