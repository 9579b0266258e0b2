"""What training with an adapter starts from, and adapters as PEFT's files."""

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file

from gvpo_jax.errors import UserError
from gvpo_jax.models.config import TARGETS, ModelConfig
from gvpo_jax.models.decoder import DecoderConfig, param_shapes
from gvpo_jax.models.export import new_folder, write_about
from gvpo_jax.models.hf_files import READABLE, open_file, read_json, write_json
from gvpo_jax.models.hf_tensors import check_finite, tensor_specs
from gvpo_jax.models.load import LoadedModel, download
from gvpo_jax.models.lora import KERNEL, A, B, Lora, Params, adapter_shapes, init_adapter
from gvpo_jax.parallel.layout import place_params, shardings

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter_config.json may ask for that changes what is computed, beside alpha and rank.
_NOT_COMPUTED = (
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


def as_peft(shape: DecoderConfig, lora: Lora | None) -> Lora | None:
    """The form of an adapter that can be written as PEFT's files; None: it can't, or is none."""
    with contextlib.suppress(UserError):
        return lora and (lora if _names(shape, lora) else None)
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
    local = Path(name).expanduser()
    folder = local if local.exists() else download(name, [_SETTINGS, _WEIGHTS])
    settings = read_json(folder / _SETTINGS)
    if settings is None:
        raise UserError(f"{folder} holds no {_SETTINGS}, so it is not a PEFT adapter")
    _refuse_unsupported(folder / _SETTINGS, settings)
    if settings.get("r") != lora.rank:
        rank = settings.get("r")
        raise UserError(f"{folder} is an adapter of rank {rank}: give model.lora.rank={rank}")
    root = math.sqrt(lora.rank) if settings.get("use_rslora") else lora.rank
    factor = settings.get("lora_alpha", 8) / root / lora.scale
    tensors = _read_tensors(folder)
    _check_tensors(folder, tensors, shape, lora)
    paths = {theirs: path for path, theirs in _names(shape, lora).items()}
    adapter = {}
    for theirs, array in tensors.items():
        path = paths[theirs]
        adapter[path] = np.ascontiguousarray(array.T) * np.float32(factor if path[-1] == B else 1)
    return unflatten_dict(adapter)


def export_adapter(
    folder: str | Path,
    loaded: LoadedModel,
    adapter: Params,
    lora: Lora,
    *,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter as PEFT does, with the tokenizer; returns the folder.

    The folder appears whole or not at all; an earlier export there is replaced.

    Args:
        folder: where the export goes; its parent folders are made.
        loaded: the model that it belongs to.
        adapter: NumPy or JAX arrays that this process can read in full.
        lora: its form.
        about: what gvpo_jax_export.json says beside the start model.

    Raises:
        UserError: a folder that holds something other than an export, or can't be written.
    """
    folder, leaves = Path(folder), flatten_dict(adapter)
    names = _names(loaded.config, lora)
    arrays = {
        names[path]: np.ascontiguousarray(np.asarray(leaf, np.float32).T)
        for path, leaf in leaves.items()
    }
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded.name,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [TARGETS[name] for name in lora.targets],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with new_folder(folder) as new:
        save_file(arrays, new / _WEIGHTS, metadata={"format": "pt"})
        (new / _WEIGHTS).chmod(0o644)  # safetensors leaves it to its owner alone
        write_json(new / _SETTINGS, settings)
        write_about(new, loaded, about or {})
    return folder


def _names(shape: DecoderConfig, lora: Lora) -> dict[tuple[Any, ...], str]:
    """PEFT's name of every array of an adapter, by path."""
    adapted = {path[:-1] for path in flatten_dict(adapter_shapes(param_shapes(shape), lora))}
    paths = {"/".join(map(str, path)): path for path in adapted}
    names: dict[tuple[Any, ...], str] = {}
    for tensor, spec in tensor_specs(shape).items():
        layers = [path.removesuffix(f"/{KERNEL}") for path in spec.paths]
        if layers[0] not in paths:
            continue
        if len(layers) > 1:
            raise UserError(
                f"adapters of the family {shape.family} can't be read or written: {tensor} holds "
                f"{len(layers)} layers; gvpo-jax export merges an adapter into the weights"
            )
        theirs = f"base_model.model.{tensor.removesuffix('.weight')}"
        names[*paths[layers[0]], A] = f"{theirs}.lora_A.weight"
        names[*paths[layers[0]], B] = f"{theirs}.lora_B.weight"
    return names


def _refuse_unsupported(file: Path, settings: Mapping[str, Any]) -> None:
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{file}: peft_type {kind} is not supported, only LORA")
    asked = [name for name in _NOT_COMPUTED if settings.get(name)]
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
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    known = {ours for ours, theirs in TARGETS.items() if theirs in layers}
    if known and known != set(lora.targets):
        targets = ",".join(name for name in TARGETS if name in known)
        raise UserError(
            f"{folder} is an adapter of the layers {targets}: give model.lora.targets=[{targets}]"
        )
    specs = {f"base_model.model.{name}": spec.shape for name, spec in tensor_specs(shape).items()}
    expected = set(_names(shape, lora).values())
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
