"""Hugging Face tensor names <-> parameters, strict both ways.

Llama, Qwen2 and Qwen3 are one decoder with different switches, so one table of names serves all.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig

ParamPath = tuple[str | int, ...]
Place = Callable[[ParamPath, np.ndarray], Any]


@dataclass(frozen=True)
class TensorSpec:
    """Where one Hugging Face tensor lives in the parameters, and its shape in the file."""

    path: ParamPath
    shape: tuple[int, ...]
    transposed: bool = False  # the file has [out, in], the parameters [in, out]


@dataclass(frozen=True)
class TensorSource:
    """Tensors by Hugging Face name; `read` gives float32 in the file's own layout."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def tensor_specs(config: DecoderConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this decoder, by Hugging Face name."""
    width, vocab = config.hidden_size, config.vocab_size
    specs = {"model.embed_tokens.weight": TensorSpec(("embed", "embedding"), (vocab, width))}
    for layer in range(config.num_layers):
        specs |= _layer_specs(config, layer)
    specs["model.norm.weight"] = TensorSpec(("final_norm", "scale"), (width,))
    if not config.tie_embeddings:
        specs["lm_head.weight"] = TensorSpec(("head", "kernel"), (vocab, width), transposed=True)
    return specs


def read_params(config: DecoderConfig, source: TensorSource, *, place: Place) -> dict[str, Any]:
    """Parameters of a checkpoint, tensor by tensor through `place(path, array)`.

    All names and shapes are checked before the first tensor is read. Raises UserError naming a
    missing, unexpected or mis-shaped tensor.
    """
    specs = tensor_specs(config)
    shapes = {name: shape for name, shape in source.shapes.items() if not _is_buffer(name)}
    tied_copy = config.tie_embeddings and "lm_head.weight" in shapes
    if tied_copy:
        del shapes["lm_head.weight"]
    _check_tensors(config, specs, shapes, source.name)
    if tied_copy:
        _check_tied_copy(source)
    params: dict[str, Any] = {}
    for name, spec in specs.items():
        array = source.read(name)
        _insert(
            params,
            spec.path,
            place(spec.path, np.ascontiguousarray(array.T if spec.transposed else array)),
        )
    return params


def hf_leaves(
    config: DecoderConfig, params: Mapping[Any, Any]
) -> dict[str, tuple[TensorSpec, Any]]:
    """Parameters under their Hugging Face names, still in our layout.

    Raises UserError naming a parameter that is missing, unexpected or mis-shaped.
    """
    leaves = dict(_flatten(params, ()))
    named = {}
    for name, spec in tensor_specs(config).items():
        if spec.path not in leaves:
            raise UserError(f"the parameters lack {_dotted(spec.path)} (exported as {name})")
        leaf = leaves.pop(spec.path)
        expected = spec.shape[::-1] if spec.transposed else spec.shape
        if tuple(leaf.shape) != expected:
            raise UserError(
                f"parameter {_dotted(spec.path)} has shape {tuple(leaf.shape)}, "
                f"the config asks for {expected}"
            )
        named[name] = (spec, leaf)
    if leaves:
        raise UserError(
            f"the parameters hold {_listed(map(_dotted, leaves))}, which the config does not know"
        )
    return named


def _layer_specs(config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
    width, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (  # Hugging Face name, ours, in, out, has a bias
        ("self_attn.q_proj", ("attn", "q"), width, q_width, config.qkv_bias),
        ("self_attn.k_proj", ("attn", "k"), width, kv_width, config.qkv_bias),
        ("self_attn.v_proj", ("attn", "v"), width, kv_width, config.qkv_bias),
        ("self_attn.o_proj", ("attn", "o"), q_width, width, config.o_bias),
        ("mlp.gate_proj", ("mlp", "gate"), width, inner, config.mlp_bias),
        ("mlp.up_proj", ("mlp", "up"), width, inner, config.mlp_bias),
        ("mlp.down_proj", ("mlp", "down"), inner, width, config.mlp_bias),
    )
    norms: list[tuple[str, ParamPath, int]] = [
        ("input_layernorm", ("input_norm",), width),
        ("post_attention_layernorm", ("post_norm",), width),
    ]
    if config.qk_norm:
        norms += [
            ("self_attn.q_norm", ("attn", "q_norm"), config.head_dim),
            ("self_attn.k_norm", ("attn", "k_norm"), config.head_dim),
        ]
    prefix, at = f"model.layers.{layer}.", ("layers", layer)
    specs = {}
    for name, path, n_in, n_out, has_bias in linears:
        specs[f"{prefix}{name}.weight"] = TensorSpec(
            (*at, *path, "kernel"), (n_out, n_in), transposed=True
        )
        if has_bias:
            specs[f"{prefix}{name}.bias"] = TensorSpec((*at, *path, "bias"), (n_out,))
    for name, path, size in norms:
        specs[f"{prefix}{name}.weight"] = TensorSpec((*at, *path, "scale"), (size,))
    return specs


def _is_buffer(name: str) -> bool:
    # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
    return name.endswith("rotary_emb.inv_freq")


def _check_tensors(
    config: DecoderConfig,
    specs: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    if missing := [name for name in specs if name not in shapes]:
        raise UserError(f"{source} lacks tensor {_listed(missing)}, which its config asks for")
    if extra := [name for name in shapes if name not in specs]:
        raise UserError(
            f"{source} holds tensor {_listed(extra)}, "
            f"which a {config.family} of its config does not have"
        )
    for name, spec in specs.items():
        if tuple(shapes[name]) != spec.shape:
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(shapes[name])}, "
                f"its config asks for {spec.shape}"
            )


def _check_tied_copy(source: TensorSource) -> None:
    if not np.array_equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
        raise UserError(
            f"{source.name}: lm_head.weight differs from the embedding it should be tied to; "
            "set tie_word_embeddings to false in config.json"
        )


def _insert(tree: dict[Any, Any], path: ParamPath, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _flatten(tree: Mapping[Any, Any], at: ParamPath) -> Iterator[tuple[ParamPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*at, key))
        else:
            yield (*at, key), value


def _dotted(path: ParamPath) -> str:
    return ".".join(map(str, path))


def _listed(names: Any) -> str:
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first
