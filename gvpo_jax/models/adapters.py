"""What training with an adapter starts from, and adapters as PEFT's files."""

import contextlib
import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file

from gvpo_jax.buckets import fetch, is_address
from gvpo_jax.errors import UserError
from gvpo_jax.models.config import ModelConfig
from gvpo_jax.models.decoder import DecoderConfig, param_shapes
from gvpo_jax.models.export import new_folder, write_about, write_texts
from gvpo_jax.models.hf_files import READABLE, open_file, read_json, write_json
from gvpo_jax.models.hf_tensors import check_finite, tensor_specs
from gvpo_jax.models.load import LoadedModel, download
from gvpo_jax.models.lora import KERNEL, A, B, Lora, Params, adapter_shapes, init_adapter
from gvpo_jax.models.lora_targets import TARGETS
from gvpo_jax.parallel.layout import place_params, shardings

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter_config.json may ask for that changes what is computed, beside alpha and rank.
NOT_COMPUTED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias",
    "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "monteclora_config",
)  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # which leave the base as it is


def check_start(model: ModelConfig, shape: DecoderConfig) -> None:
    """That `start` will succeed, before the model's weights are read; raises as it does."""
    lora = model.lora.form()
    model.param_shapes(shape)
    if lora is not None and model.adapter is not None:
        read_adapter(model.adapter, shape, lora)


def start(
    model: ModelConfig, shape: DecoderConfig, loaded: Params, mesh: Mesh, seed: int
) -> tuple[Params | None, Params]:
    """What stays as it is and what is trained of a loaded model, on the mesh.

    Args:
        model: how it is trained.
        shape: its shape.
        loaded: its parameters, on the mesh.
        mesh: the devices.
        seed: of a new adapter.

    Raises:
        UserError: the adapter does not fit the model, or can't be read.
    """
    lora = model.lora.form()
    if lora is None:
        return None, loaded
    if model.adapter is not None:
        return loaded, place_params(mesh, read_adapter(model.adapter, shape, lora))
    shapes = adapter_shapes(loaded, lora)
    init = functools.partial(init_adapter, shapes, seed)
    return loaded, jax.jit(init, out_shardings=shardings(mesh, shapes))()


def base_warning(model: ModelConfig) -> str | None:
    """What is odd about the base of a config's adapter, told before the base is read.

    Raises:
        UserError: the adapter's settings say that it can't be read, as `read_adapter`.
    """
    lora = model.lora.form()
    if lora is None or model.adapter is None:
        return None
    folder, settings = _open(model.adapter, lora)
    base = settings.get("base_model_name_or_path")
    if not base or _bare(str(base)) == _bare(model.name):
        return None
    return (
        f"{folder} was trained beside {base}, and model.name is {model.name}: beside other weights "
        "an adapter does something else"
    )


def as_peft(shape: DecoderConfig, lora: Lora | None) -> Lora | None:
    """The form of an adapter that PEFT's files hold as it is; None: they can't, or is none."""
    with contextlib.suppress(UserError):
        _check_mixture(shape, lora)
        fused = lora and any(len(parts) > 1 for parts in _layers(shape, lora).values())
        return None if fused else lora
    return None


def read_adapter(name: str, shape: DecoderConfig, lora: Lora) -> Params:
    """A PEFT adapter as NumPy arrays; B is rescaled from the adapter's scale to that of `lora`.

    Args:
        name: a folder, or a name on the hub.
        shape: of the model.
        lora: the form that the adapter must have, but for alpha.

    Raises:
        UserError: there is none, it is of another form or another model, it asks for what is not
            computed here, or it is broken.
    """
    folder, settings = _open(name, lora)
    root = math.sqrt(lora.rank) if settings.get("use_rslora") else lora.rank
    factor = settings.get("lora_alpha", 8) / root / lora.scale
    tensors = _read_tensors(folder)
    _check_tensors(folder, tensors, shape, lora)
    adapter = {}
    for layer, parts in _layers(shape, lora).items():
        a, b = (tensors[name].T for name in _arrays(layer))
        ends = np.cumsum([rows for _, rows in parts])
        for (path, _), of_part in zip(parts, np.split(b, ends[:-1], axis=1), strict=True):
            adapter[*path, A] = np.ascontiguousarray(a)
            adapter[*path, B] = np.ascontiguousarray(of_part) * np.float32(factor)
    return unflatten_dict(adapter)


def export_adapter(
    folder: str | Path,
    loaded: LoadedModel,
    adapter: Params,
    lora: Lora,
    *,
    about: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter as PEFT does, with the tokenizer; returns the folder.

    The folder appears whole or not at all; an earlier export there is replaced. Where a tensor
    holds several layers, their A lie one below the other, and all ranks grow to fit.

    Args:
        folder: where the export goes; its parent folders are made.
        loaded: the model that it belongs to.
        adapter: NumPy or JAX arrays that this process can read in full.
        lora: its form.
        about: what gvpo_jax_export.json says beside the start model.
        texts: files that are written too, such as README.md: name -> text.

    Raises:
        UserError: a folder that holds something other than an export, or can't be written; an
            adapter that PEFT would take for another.
    """
    folder, leaves = Path(folder), flatten_dict(adapter)
    _check_mixture(loaded.config, lora)
    layers = _layers(loaded.config, lora)
    rank = lora.rank * max(sum((*path, A) in leaves for path, _ in x) for x in layers.values())
    arrays = {}
    for layer, parts in layers.items():
        arrays |= zip(_arrays(layer), _stacked(leaves, parts, rank), strict=True)
    alpha = lora.alpha * (rank // lora.rank)
    alpha = int(alpha) if alpha == int(alpha) else alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded.name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers)),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with new_folder(folder) as new:
        save_file(arrays, new / _WEIGHTS, metadata={"format": "pt"})
        write_json(new / _SETTINGS, settings)
        write_about(new, loaded, about or {})
        write_texts(new, texts or {})
    return folder


def _open(name: str, lora: Lora) -> tuple[Path, dict[str, Any]]:
    """The folder of an adapter of this form, and its settings."""
    local = fetch(name) if is_address(name) else Path(name).expanduser()
    if not os.path.exists(local) and name.startswith((".", "/", "~")):
        raise UserError(f"model.adapter={name}: there is no such folder")
    folder = local if os.path.exists(local) else download(name, [_SETTINGS, _WEIGHTS])
    settings = read_json(folder / _SETTINGS)
    if settings is None:
        raise UserError(
            f"model.adapter={name}: {folder} holds no {_SETTINGS}, so it is not a PEFT adapter"
        )
    _refuse_unsupported(folder / _SETTINGS, settings)
    if settings.get("r") != lora.rank:
        rank = settings.get("r")
        raise UserError(f"{folder} is an adapter of rank {rank}: give model.lora.rank={rank}")
    return folder, settings


def _bare(name: str) -> str:
    """A model's name without owner, folders, and what it is quantised to."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    return re.sub(r"([-.](unsloth|bnb-[48]bit|i?q\d\w*|f16|bf16|f32))+$", "", last)


def _check_mixture(shape: DecoderConfig, lora: Lora | None) -> None:
    """PEFT 0.21 takes these names for the experts of every layer, and drops what is not theirs."""
    if lora is None or shape.experts is None:
        return
    adapted = {path[-2] for path in flatten_dict(adapter_shapes(param_shapes(shape), lora))}
    if odd := sorted(adapted & {"gate", "up", "down"}):
        raise UserError(
            f"PEFT takes adapters of {', '.join(odd)} in a mixture for those of its experts, so "
            "they are not written: export the model with the adapter merged into its weights, or "
            "train with model.lora.targets=[q,k,v,o]"
        )


def _layers(shape: DecoderConfig, lora: Lora) -> dict[str, list[tuple[tuple[Any, ...], int]]]:
    """PEFT's names of the layers that have adapters: the paths in each, and how many rows."""
    adapted = {path[:-1] for path in flatten_dict(adapter_shapes(param_shapes(shape), lora))}
    whole = flatten_dict(param_shapes(shape))
    paths = {"/".join(map(str, path)): path[:-1] for path in whole if path[-1] == KERNEL}
    layers = {}
    for tensor, spec in tensor_specs(shape).items():
        parts = [paths.get(path) for path in spec.paths]
        if adapted.intersection(parts):
            name = f"base_model.model.{tensor.removesuffix('.weight')}"
            layers[name] = list(zip(parts, spec.rows, strict=True))
    return layers


def _kinds(shape: DecoderConfig) -> dict[str, set[str]]:
    """Of each linear layer's name in files, which of `TARGETS` it holds."""
    kinds: dict[str, set[str]] = {}
    for tensor, spec in tensor_specs(shape).items():
        held = {path.removesuffix(f"/{KERNEL}").rpartition("/")[2] for path in spec.paths}
        kinds.setdefault(tensor.removesuffix(".weight").rpartition(".")[2], set()).update(held)
    return {name: held & TARGETS.keys() for name, held in kinds.items()}


def _arrays(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def _stacked(leaves: Mapping[Any, Any], parts: list[Any], rank: int) -> tuple[Any, Any]:
    """A and B of the layers in a tensor: each has rows of A, and columns of B, of its own."""
    width = next(len(leaves[*path, A]) for path, _ in parts if (*path, A) in leaves)
    a = np.zeros((rank, width), np.float32)
    b = np.zeros((sum(rows for _, rows in parts), rank), np.float32)
    row = column = 0
    for path, rows in parts:
        if (*path, A) in leaves:
            of_part = np.asarray(leaves[*path, A]).T
            end = column + len(of_part)
            a[column:end] = of_part
            b[row : row + rows, column:end] = np.asarray(leaves[*path, B]).T
            column = end
        row += rows
    return a, b


def _refuse_unsupported(file: Path, settings: Mapping[str, Any]) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{file}: peft_type {kind} is not supported, only LORA")
    asked = [name for name in NOT_COMPUTED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        asked.append(f"bias={settings['bias']}")
    if settings.get("init_lora_weights", True) not in _STARTS:
        asked.append(f"init_lora_weights={settings['init_lora_weights']}, which changes the base")
    if asked:
        raise UserError(f"{file} asks for {asked[0]}, which is not supported")


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / _WEIGHTS
    if not file.is_file():
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{folder} holds a pickled adapter, which is never opened; save it as safetensors"
            )
        raise UserError(f"{folder} holds no {_WEIGHTS}")
    opened, arrays = open_file(file), {}
    for name in opened.keys():  # noqa: SIM118 (not a mapping)
        kind = opened.get_slice(name).get_dtype()
        if kind not in READABLE:
            raise UserError(
                f"{file}: tensor {name} is of type {kind}; only {', '.join(READABLE)} can be read"
            )
        arrays[name] = opened.get_tensor(name).astype(np.float32, copy=False)
        check_finite(arrays[name], f"{file}: tensor {name}")
    return arrays


def _check_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], shape: DecoderConfig, lora: Lora
) -> None:
    """That an adapter has the matrices of this form for this model, and no others."""
    whole, holds = param_shapes(shape), _kinds(shape)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    known = set().union(*(ours for theirs, ours in holds.items() if theirs in layers))
    if known and known != {path[-2] for path in flatten_dict(adapter_shapes(whole, lora))}:
        targets = ",".join(name for name in TARGETS if name in known)
        raise UserError(
            f"{folder} is an adapter of the layers {targets}: give model.lora.targets=[{targets}]"
        )
    specs = {f"base_model.model.{name}": spec.shape for name, spec in tensor_specs(shape).items()}
    expected = {name for layer in _layers(shape, lora) for name in _arrays(layer)}
    if odd := sorted(tensors.keys() ^ expected):
        what = "lacks" if odd[0] in expected else "holds"
        raise UserError(
            f"{folder} {what} {odd[0]}: it is not an adapter of this model; model.name must be its "
            "base"
        )
    for name, array in tensors.items():
        layer, which = name.removesuffix(".weight").rsplit(".", 1)
        d_out, d_in = specs[f"{layer}.weight"]
        wanted = (lora.rank, d_in) if which == "lora_A" else (d_out, lora.rank)
        if array.shape != wanted:
            raise UserError(
                f"{folder}: tensor {name} has shape {array.shape}, this model asks for {wanted}; "
                "model.name must be the adapter's base"
            )
