"""Reading and writing the safetensors and JSON files of a model folder."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.hf_tensors import TensorSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
READABLE = ("F32", "BF16", "F16")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files hold, in Hugging Face's terms; the weights stay on disk until read."""

    config: DecoderConfig
    hf_config: dict[str, Any]
    tensors: TensorSource
    tokenizer: PreTrainedTokenizerBase
    generation_config: dict[str, Any] = field(default_factory=dict)


def open_safetensors(folder: Path) -> TensorSource:
    """Tensors of a folder's safetensors files, single or with an index.

    Raises:
        UserError: no weights, a broken file, a tensor present twice, and an index that disagrees
            with its files.
    """
    files, index = _weight_files(folder)
    opened = {file.name: open_file(file) for file in files}
    file_of: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, tensors in opened.items():
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            if name in file_of:
                raise UserError(
                    f"{folder}: tensor {name} is in both {file_of[name]} and {file}; keep one"
                )
            kind = tensors.get_slice(name).get_dtype()
            if kind not in READABLE:
                raise UserError(
                    f"{folder / file}: tensor {name} is of type {kind}; "
                    f"only {', '.join(READABLE)} can be read"
                )
            file_of[name], shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
    if index is not None:
        _check_index(folder, index, file_of)

    def read(name: str) -> np.ndarray:
        return opened[file_of[name]].get_tensor(name).astype(np.float32, copy=False)

    return TensorSource(str(folder), shapes, read)


def write_safetensors(
    folder: Path, tensors: TensorSource, *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes all tensors, one shard in memory at a time."""
    kind, weight_map = as_dtype(dtype), {}
    sizes = {name: math.prod(shape) * kind.itemsize for name, shape in tensors.shapes.items()}
    shards = list(_shards(sizes, max_shard_bytes))
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = SINGLE_NAME
        arrays = {name: np.ascontiguousarray(tensors.read(name), dtype=kind) for name in names}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def open_file(file: Path) -> Any:
    """One safetensors file; a UserError where it is none."""
    check_fetched(file)
    try:
        return safe_open(file, framework="np")
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing, though the index names it") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error


def as_dtype(name: str) -> np.dtype:
    """The NumPy type of "float32" or "bfloat16"; another name is a UserError."""
    if name not in _DTYPES:
        raise UserError(f"cannot write weights as {name!r}; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_fetched(file: Path) -> None:
    """Raises UserError where a file is the pointer that Git LFS leaves in place of the real one."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{file} is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
            )


def read_json(file: Path, **options: Any) -> dict[str, Any] | None:
    """The object in a file, None where there is no file; `options` are those of `json.loads`."""
    if not file.is_file():
        return None
    check_fetched(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"), **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON object."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    single, index_file = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file() and index_file.is_file():
        raise UserError(
            f"{folder} holds both {SINGLE_NAME} and {INDEX_NAME}; "
            "remove the one that is not the model"
        )
    if single.is_file():
        return [single], None
    if index_file.is_file():
        index = _read_index(index_file)
        return [folder / name for name in sorted(set(index.values()))], index
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1 and not others[0].name.startswith("adapter"):
        return others, None
    if others:
        raise UserError(
            f"{folder} holds {others[0].name} but neither {SINGLE_NAME} nor {INDEX_NAME}"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(
            f"{folder} holds pickled weights only, which are never opened; "
            "convert them to safetensors first"
        )
    raise UserError(f"{folder} holds no weights: {SINGLE_NAME} or {INDEX_NAME} is missing")


def _read_index(file: Path) -> dict[str, str]:
    index = read_json(file, object_pairs_hook=_unique_keys) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: weight_map is empty or missing")
    for name in weight_map.values():
        if not (isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name)):
            raise UserError(f"{file} names {name!r}; only safetensors files beside it can be read")
    return weight_map


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key} is listed twice")
        result[key] = value
    return result


def _check_index(folder: Path, index: Mapping[str, str], file_of: Mapping[str, str]) -> None:
    for name, file in index.items():
        if file_of.get(name) != file:
            raise UserError(
                f"{folder}: {INDEX_NAME} places tensor {name} in {file}, which does not hold it"
            )
    for name, file in file_of.items():
        if name not in index:
            raise UserError(f"{folder}: tensor {name} in {file} is not listed in {INDEX_NAME}")


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    if shard:
        yield shard
