"""Reading a .gguf file: config, weights and tokenizer, all from the one file or its parts.

llama.cpp keeps Hugging Face's numbers under other names, with three exceptions. It reorders the
rows of a Llama's q and k for its own rotary layout. It adds 1 to the norms of Gemma. The experts of
a layer lie in one tensor. Quantized weights are expanded to float32 with NumPy.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import Family, all_families
from gvpo_jax.models.gguf_header import check_header
from gvpo_jax.models.gguf_tokenizer import build_tokenizer, end_token_ids
from gvpo_jax.models.hf_config import config_json, decoder_config
from gvpo_jax.models.hf_files import ModelFiles, check_fetched
from gvpo_jax.models.hf_tensors import TensorSource
from gvpo_jax.models.rope import RopeScaling, frequencies, stretched

# Our parameters by llama.cpp's names: outside of layers, and behind blk.N.
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_NAMES = {
    "attn_norm": "input_norm",
    "post_attention_norm": "attn_out_norm",
    "ffn_norm": "post_norm",
    "post_ffw_norm": "mlp_out_norm",
    "attn_q": "attn/q",
    "attn_k": "attn/k",
    "attn_v": "attn/v",
    "attn_output": "attn/o",
    "attn_q_norm": "attn/q_norm",
    "attn_k_norm": "attn/k_norm",
    "ffn_gate": "mlp/gate",
    "ffn_up": "mlp/up",
    "ffn_down": "mlp/down",
    "ffn_gate_inp": "mlp/router",
    "ffn_gate_exps": "mlp/experts/gate",
    "ffn_up_exps": "mlp/experts/up",
    "ffn_down_exps": "mlp/experts/down",
    "ffn_gate_inp_shexp": "mlp/shared_gate",
    "ffn_gate_shexp": "mlp/shared/gate",
    "ffn_up_shexp": "mlp/shared/up",
    "ffn_down_shexp": "mlp/shared/down",
}
# Of Llama 3.1 to 3.3: low_freq_factor, high_freq_factor, original_max_position_embeddings.
_LLAMA_3 = (1.0, 4.0, 8192)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a Hugging Face file in a .gguf file."""

    stored: Any
    expert: int | None = None  # which one along the first axis; None: it is all of it

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.stored.shape[::-1].tolist())  # GGUF lists the innermost axis first
        return shape if self.expert is None else shape[1:]

    def read(self) -> np.ndarray:
        import gguf

        data = self.stored.data if self.expert is None else self.stored.data[self.expert]
        return gguf.dequantize(data, self.stored.tensor_type)


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
    family = _family(path, metadata)
    stored = [tensor for reader in readers for tensor in reader.tensors]
    every = [named for tensor in stored for named in _hf_tensors(family, tensor)]
    tensors = dict(every)
    if len(tensors) < len(every):
        raise UserError(f"{path}: a tensor is there twice; its files are of different models")
    factors = tensors.pop("rope_freqs.weight", None)
    config = _config(path, family, metadata, tensors)
    if factors is not None:
        config = _scaled(path, config, factors)
    try:
        tokenizer = build_tokenizer(str(path), metadata, config.max_position_embeddings)
        ends = end_token_ids(metadata)
    except UserError:
        raise
    except Exception as error:  # tokenizers has bare ones
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: no tokenizer can be made of what it holds ({what})") from error
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
        check_header(path)
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a whole .gguf file: {error}") from error


def _family(path: Path, metadata: Mapping[str, Any]) -> Family:
    name = metadata.get("general.architecture")
    known = {family.gguf: family for family in all_families().values() if family.gguf}
    if name not in known:
        raise UserError(f"{path}: architecture {name!r} is not supported, only {', '.join(known)}")
    return known[name]


def _config(
    path: Path, family: Family, metadata: Mapping[str, Any], tensors: Mapping[str, _Tensor]
) -> DecoderConfig:
    def get(key: str) -> Any:
        return metadata.get(f"{family.gguf}.{key}")

    _refuse_unsupported(path, family, get)
    layers, hidden, heads = (
        _positive(path, family, key, get(key))
        for key in ("block_count", "embedding_length", "attention.head_count")
    )
    if layers > len(tensors):
        raise UserError(f"{path}: block_count is {layers}, and it has {len(tensors)} tensors")
    values = {
        "model_type": family.model_type,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())) or None,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv") or heads,
        "head_dim": get("attention.key_length") or hidden // heads,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon") or 1e-6),
        "rope_theta": _shortest(get("rope.freq_base") or 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
        **(_experts(family, get) if get("expert_count") else {}),
        **(_gemma(get) if family.gguf == "gemma3" else {}),
    }
    try:
        return decoder_config(values)
    except UserError as error:
        raise UserError(str(error).replace("config.json", f"{path} (as config.json)", 1)) from error


def _positive(path: Path, family: Family, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {family.gguf}.{key} must be a whole number from 1, is {value!r}")
    return value


def _experts(family: Family, get: Callable[[str], Any]) -> dict[str, Any]:
    return {
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
        "norm_topk_prob": family.gguf == "qwen3moe",  # which llama.cpp knows by the architecture
    }


def _gemma(get: Callable[[str], Any]) -> dict[str, Any]:
    """Gemma 3's own; of its sizes only 27B, with 62 layers, scales scores by another width."""
    hidden, heads = get("embedding_length"), get("attention.head_count")
    factor = get("rope.scaling.factor")
    values = {
        "sliding_window": get("attention.sliding_window"),
        "rope_local_base_freq": _shortest(get("rope.freq_base_swa") or 10000.0),
        "rope_scaling": factor and {"rope_type": "linear", "factor": _shortest(factor)},
        "final_logit_softcapping": get("final_logit_softcapping"),
    }
    if get("block_count") == 62 and hidden and heads:
        values["query_pre_attn_scalar"] = hidden // heads
    else:
        values["query_pre_attn_scalar"] = get("attention.key_length")
    return values


def _refuse_unsupported(path: Path, family: Family, get: Callable[[str], Any]) -> None:
    gemma = family.gguf == "gemma3"
    scalings = (None, "none", "linear") if gemma else (None, "none")
    if get("rope.scaling.type") not in scalings:
        raise _unread_scaling(path)
    if get("attention.sliding_window") and not gemma:
        raise UserError(f"{path}: sliding window attention is not supported")
    if get("expert_count") and "num_experts" not in family.silent:
        raise UserError(
            f"{path}: mixtures of experts of architecture {family.gguf} are not supported"
        )
    rotated, width = get("rope.dimension_count"), get("attention.key_length")
    if rotated and width and rotated != width:
        raise UserError(f"{path}: only {rotated} of {width} head dimensions rotate: not supported")


def _scaled(path: Path, config: DecoderConfig, stored: _Tensor) -> DecoderConfig:
    """With Llama 3's scaling, of which llama.cpp keeps what each frequency is divided by."""
    factors, freqs = stored.read(), frequencies(config.rope_theta, config.head_dim)
    if factors.shape != freqs.shape:
        raise _unread_scaling(path)
    scaling = RopeScaling(round(float(factors.max()), 3), *_LLAMA_3)
    expected = freqs / stretched(freqs, scaling)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise _unread_scaling(path)
    return dataclasses.replace(config, rope_scaling=scaling)


def _unread_scaling(path: Path) -> UserError:
    return UserError(
        f"{path}: these scaled rotary embeddings are not read from .gguf files; load the model's "
        "safetensors folder instead"
    )


def _source(path: Path, config: DecoderConfig, tensors: Mapping[str, _Tensor]) -> TensorSource:
    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            array = tensor.read()
        except NotImplementedError as error:
            kind = tensor.stored.tensor_type.name
            raise UserError(f"{path}: weights of type {kind} cannot be read") from error
        for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            if config.family == "llama" and f".self_attn.{part}_proj." in name:
                array = _unpermute(array, heads)
        if config.norm == "one_plus" and name.endswith("norm.weight"):
            array = array - 1
        return np.asarray(array, np.float32).reshape(shapes[name])

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    gates = [name for name in shapes if name.endswith(".shared_expert_gate.weight")]
    shapes |= {name: (1, shapes[name][-1]) for name in gates}  # llama.cpp takes them for vectors
    return TensorSource(str(path), shapes, read)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's order of rows, pairs side by side, to Hugging Face's, halves."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _hf_tensors(family: Family, stored: Any) -> Iterator[tuple[str, _Tensor]]:
    """By their Hugging Face names; a name that has none stays, to be reported as unexpected."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored.name)
    layer, part, kind = found.groups() if found else (None, "", "")
    if layer is None:
        name = f"{_OUTER[part]}.{kind}" if part in _OUTER else stored.name
        yield name, _Tensor(stored)
        return
    ours = _NAMES.get(part)
    if ours is None or ours not in family.names:
        yield stored.name, _Tensor(stored)
        return
    name = f"model.layers.{layer}.{family.names[ours]}.{kind}"
    if "{expert}" not in name:
        yield name, _Tensor(stored)
        return
    for expert in range(stored.shape[-1]):
        yield name.format(expert=expert), _Tensor(stored, expert)


def _shortest(value: Any) -> Any:
    # stored as float32: 9.999999747378752e-06 was written as 1e-05
    return float(str(np.float32(value))) if isinstance(value, float) else value
