"""Reading and writing the safetensors files of a model folder."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gvpo_jax.errors import UserError
from gvpo_jax.models.hf_tensors import TensorSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_READABLE = ("F32", "BF16", "F16")
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def open_safetensors(folder: Path) -> TensorSource:
    """Tensors of a folder's safetensors files, single or with an index.

    Raises UserError for no weights, a broken file, a tensor present twice, and an index that
    disagrees with its files.
    """
    files, index = _weight_files(folder)
    owner: dict[str, Any] = {}
    file_of: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        opened = _open(file)
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if name in owner:
                raise UserError(
                    f"{folder}: tensor {name} is in both {file_of[name]} and {file.name}; keep one"
                )
            kind = opened.get_slice(name).get_dtype()
            if kind not in _READABLE:
                raise UserError(
                    f"{file}: tensor {name} is of type {kind}; "
                    f"only {', '.join(_READABLE)} can be read"
                )
            owner[name], file_of[name] = opened, file.name
            shapes[name] = tuple(opened.get_slice(name).get_shape())
    if index is not None:
        _check_index(folder, index, file_of)
    return TensorSource(
        str(folder),
        shapes,
        lambda name: owner[name].get_tensor(name).astype(np.float32, copy=False),
    )


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes tensors, given as shape and function of the array, one shard in memory at a time."""
    item_bytes = as_dtype(dtype).itemsize
    sizes = {name: int(np.prod(shape)) * item_bytes for name, (shape, _) in tensors.items()}
    shards = list(_shards(sizes, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = (
            SINGLE_NAME
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        arrays = {
            name: np.ascontiguousarray(tensors[name][1](), dtype=as_dtype(dtype)) for name in names
        }
        save_file(arrays, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves it to its owner alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def as_dtype(name: str) -> np.dtype:
    """The NumPy type of "float32" or "bfloat16"; another name is a UserError."""
    if name not in _DTYPES:
        raise UserError(f"cannot write weights as {name!r}; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


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
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)[
            "weight_map"
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not an index with a weight_map: {error}") from error
    except _DuplicateKey as error:
        raise UserError(f"{file}: {error} is listed twice") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: weight_map is empty")
    for name in weight_map.values():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise UserError(f"{file} names {name!r}; only safetensors files beside it can be read")
    return weight_map


class _DuplicateKey(Exception):
    pass


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing, though the index names it") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error


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
