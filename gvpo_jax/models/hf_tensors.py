"""Hugging Face tensor names <-> parameters, strict both ways.

Llama, Qwen2 and Qwen3 are one decoder with different switches, so one table of names serves all.
A parameter's path is spelled as `parallel.mesh.path_name` does: `layers/0/attn/q/kernel`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.parallel.layout import path_name

Place = Callable[[str, np.ndarray], Any]


@dataclass(frozen=True)
class TensorSpec:
    """Where one Hugging Face tensor lives in the parameters, and its shape in the file."""

    path: str
    shape: tuple[int, ...]
    transposed: bool = False  # the file has [out, in], the parameters [in, out]


@dataclass(frozen=True)
class TensorSource:
    """Tensors by Hugging Face name; `read` gives one in the file's own layout."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def tensor_specs(config: DecoderConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this decoder, by Hugging Face name."""
    c, width, inner = config, config.hidden_size, config.intermediate_size
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    specs = {"model.embed_tokens.weight": TensorSpec("embed/embedding", (c.vocab_size, width))}

    def linear(name: str, path: str, n_in: int, n_out: int, bias: bool) -> None:
        specs[f"{name}.weight"] = TensorSpec(f"{path}/kernel", (n_out, n_in), transposed=True)
        if bias:
            specs[f"{name}.bias"] = TensorSpec(f"{path}/bias", (n_out,))

    def norm(name: str, path: str, size: int) -> None:
        specs[f"{name}.weight"] = TensorSpec(f"{path}/scale", (size,))

    for i in range(c.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers/{i}"
        linear(f"{theirs}.self_attn.q_proj", f"{ours}/attn/q", width, q_width, c.qkv_bias)
        linear(f"{theirs}.self_attn.k_proj", f"{ours}/attn/k", width, kv_width, c.qkv_bias)
        linear(f"{theirs}.self_attn.v_proj", f"{ours}/attn/v", width, kv_width, c.qkv_bias)
        linear(f"{theirs}.self_attn.o_proj", f"{ours}/attn/o", q_width, width, c.o_bias)
        linear(f"{theirs}.mlp.gate_proj", f"{ours}/mlp/gate", width, inner, c.mlp_bias)
        linear(f"{theirs}.mlp.up_proj", f"{ours}/mlp/up", width, inner, c.mlp_bias)
        linear(f"{theirs}.mlp.down_proj", f"{ours}/mlp/down", inner, width, c.mlp_bias)
        norm(f"{theirs}.input_layernorm", f"{ours}/input_norm", width)
        norm(f"{theirs}.post_attention_layernorm", f"{ours}/post_norm", width)
        if c.qk_norm:
            norm(f"{theirs}.self_attn.q_norm", f"{ours}/attn/q_norm", c.head_dim)
            norm(f"{theirs}.self_attn.k_norm", f"{ours}/attn/k_norm", c.head_dim)
    norm("model.norm", "final_norm", width)
    if not c.tie_embeddings:
        linear("lm_head", "head", width, c.vocab_size, bias=False)
    return specs


def read_params(config: DecoderConfig, source: TensorSource, *, place: Place) -> dict[str, Any]:
    """Parameters of a checkpoint, tensor by tensor through `place(path, array)`.

    All names and shapes are checked before the first tensor is read.

    Raises:
        UserError: a tensor is missing, unexpected or mis-shaped, or holds NaN or infinite numbers.
    """
    specs, derived = tensor_specs(config), "rotary_emb.inv_freq"  # in old Llama checkpoints
    shapes = {name: shape for name, shape in source.shapes.items() if not name.endswith(derived)}
    tied_copy = shapes.pop("lm_head.weight", None) if config.tie_embeddings else None
    _check_tensors(config.family, specs, shapes, source.name)
    if tied_copy is not None:
        _check_tied_copy(source)

    def read(name: str, spec: TensorSpec) -> Any:
        array = source.read(name)
        _check_finite(array, f"{source.name}: tensor {name}")
        return place(spec.path, np.ascontiguousarray(array.T if spec.transposed else array))

    params = unflatten_dict({spec.path: read(name, spec) for name, spec in specs.items()}, sep="/")
    return params | {"layers": {int(i): layer for i, layer in params["layers"].items()}}


def named_tensors(config: DecoderConfig, params: Mapping[str, Any]) -> TensorSource:
    """Parameters under their Hugging Face names; each is fetched and transposed when it is read.

    Raises:
        UserError: a parameter is missing, unexpected or mis-shaped; names it.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    specs = tensor_specs(config)
    for name, spec in specs.items():
        if spec.path not in leaves:
            raise UserError(f"the parameters lack {spec.path} (exported as {name})")
        shape = tuple(leaves[spec.path].shape)
        expected = spec.shape[::-1] if spec.transposed else spec.shape
        if shape != expected:
            raise UserError(
                f"parameter {spec.path} has shape {shape}, the config asks for {expected}"
            )
    if extra := leaves.keys() - {spec.path for spec in specs.values()}:
        raise UserError(
            f"the parameters hold {_listed(sorted(extra))}, which the config does not know"
        )

    def read(name: str) -> np.ndarray:
        array = np.asarray(leaves[specs[name].path])
        return array.T if specs[name].transposed else array

    return TensorSource("the parameters", {name: s.shape for name, s in specs.items()}, read)


def _check_tensors(family: str, specs: dict, shapes: dict, source: str) -> None:
    if missing := [name for name in specs if name not in shapes]:
        raise UserError(f"{source} lacks tensor {_listed(missing)}, which its config asks for")
    if extra := [name for name in shapes if name not in specs]:
        raise UserError(
            f"{source} holds tensor {_listed(extra)}, which a {family} of its config does not have"
        )
    for name, spec in specs.items():
        if tuple(shapes[name]) != spec.shape:
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(shapes[name])}, "
                f"its config asks for {spec.shape}"
            )


def _check_finite(array: np.ndarray, what: str) -> None:
    with np.errstate(all="ignore"):
        total = array.sum()  # quick, and NaN or infinite where any number is
    if not np.isfinite(total) and not np.isfinite(array).all():
        bad = "NaN" if np.isnan(array).any() else "infinite"
        raise UserError(f"{what} holds {bad} numbers: these weights are broken, get others")


def _check_tied_copy(source: TensorSource) -> None:
    if not np.array_equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
        raise UserError(
            f"{source.name}: lm_head.weight differs from the embedding it should be tied to; "
            "set tie_word_embeddings to false in config.json"
        )


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first
