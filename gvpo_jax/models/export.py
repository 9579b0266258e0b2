"""Writing a model folder that transformers loads."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gvpo_jax.errors import UserError
from gvpo_jax.models.hf_files import as_dtype, read_json, write_json, write_safetensors
from gvpo_jax.models.hf_rope import older_rope
from gvpo_jax.models.hf_tensors import named_tensors
from gvpo_jax.models.load import LoadedModel
from gvpo_jax.settings import check_path

MARKER = "gvpo_jax_export.json"
CARD = "README.md"
_WRITTEN = (".json", ".safetensors", ".txt", ".jinja", ".model", ".svg")
_CARD_END = "\n<!-- written by gvpo-jax, unchanged: {} -->\n"  # the hash of what stands before it
_TEMPLATES = "additional_chat_templates"  # transformers' folder of named chat templates


def export_model(
    folder: str | Path,
    loaded: LoadedModel,
    params: Mapping[str, Any],
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    about: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Writes safetensors, config and tokenizer in the Hugging Face layout; returns the folder.

    The folder appears whole or not at all; an earlier export there is replaced.

    Args:
        folder: where the export goes; its parent folders are made.
        loaded: the model the parameters began as; gives config and tokenizer.
        params: what is written: NumPy or JAX arrays that this process can read in full.
        dtype: "float32" or "bfloat16".
        max_shard_bytes: weights beyond this go into several files with an index.
        about: what gvpo_jax_export.json says beside the start model and dtype.
        texts: files that are written too, such as README.md: name -> text.

    Raises:
        UserError: an unknown dtype, parameters that do not fit the config, and a folder that holds
            something other than an export.
    """
    folder = Path(folder)
    as_dtype(dtype)
    tensors = named_tensors(loaded.config, params)
    with new_folder(folder) as new:
        write_safetensors(new, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)
        _write_settings(new, loaded, dtype)
        write_about(new, loaded, {"dtype": dtype} | dict(about or {}))
        write_texts(new, texts or {})
    return folder


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write an export into, which takes the place of `folder` when all is written.

    Raises:
        UserError: there is something other than an export, or nothing can be written there.
    """
    check_path(folder, "the folder")
    if (folder / MARKER).is_file() and _by_hand(folder / CARD):
        raise UserError(
            f"{folder / CARD} was written or changed by hand, and would be replaced: move it away"
        )
    if folder.exists() and not _replaceable(folder):
        raise UserError(
            f"{folder} is not an earlier export, and nothing is replaced: choose another folder"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror or error}") from None
    with place as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        for file in new.rglob("*.safetensors"):  # whose writer does not ask the umask
            file.chmod((new / MARKER).stat().st_mode)
        _put(new, folder, Path(scratch) / "old")


def write_about(folder: Path, loaded: LoadedModel, about: Mapping[str, Any]) -> None:
    """Write what every export has: the tokenizer, and what the export is of."""
    _write_tokenizer(folder, loaded.tokenizer)
    write_json(folder / MARKER, {"start_model": loaded.name} | dict(about))


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of text; README.md so that it is known later whether it was changed by hand."""
    for name, text in texts.items():
        text = text.encode(errors="backslashreplace").decode()  # lone surrogates, of a model's text
        end = _CARD_END.format(_hash(text)) if name == CARD else ""
        (folder / name).write_text(text + end, encoding="utf-8", newline="\n")


def _by_hand(card: Path) -> bool:
    """Whether it is not, to the letter, what `write_texts` wrote."""
    if not card.is_file():
        return False
    content = card.read_text("utf-8", errors="replace")
    text = content[: -len(_CARD_END.format(_hash("")))]
    return content != text + _CARD_END.format(_hash(text))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _replaceable(folder: Path) -> bool:
    """Empty, or marked as ours and holding nothing but files of the kinds that an export writes."""
    if not folder.is_dir():
        return False
    entries = list(folder.iterdir())
    inside = [entry for entry in entries if entry != folder / _TEMPLATES or not entry.is_dir()]
    if len(inside) < len(entries):
        inside += (folder / _TEMPLATES).iterdir()
    ours = all(
        entry.is_file() and (entry.suffix in _WRITTEN or entry.name == CARD) for entry in inside
    )
    return not entries or (ours and (folder / MARKER).is_file())


def _put(new: Path, folder: Path, aside: Path) -> None:
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        if aside.exists():
            os.rename(aside, folder)
        raise


def _write_settings(folder: Path, loaded: LoadedModel, dtype: str) -> None:
    config = {k: v for k, v in loaded.hf_config.items() if k != "torch_dtype"}  # the older name
    config |= older_rope(config)  # which transformers before 5 reads, as the next one
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    write_json(folder / "config.json", config | {"dtype": dtype})
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {kind: config[kind] for kind in kinds if config.get(kind) is not None}
    write_json(folder / "generation_config.json", loaded.generation_config or ids)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(str(folder))
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) or {}
    # Names that transformers before 5 knows too; both read tokenizer.json as it is.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(settings_file, settings)
