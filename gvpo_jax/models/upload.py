"""Sending an export to the Hugging Face hub."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from gvpo_jax.buckets import is_address
from gvpo_jax.errors import UserError
from gvpo_jax.models.export import MARKER
from gvpo_jax.models.hf_files import read_json

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Of an earlier upload: what would be loaded in place of, or beside, the new one.
_STALE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
)


def check_repository(name: str) -> None:
    """Raise UserError where a repository of the hub can't be called so: [OWNER/]NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{name!r} is no name for a repository of the hub: give NAME or OWNER/NAME, of "
            "letters, digits, -, _ and ., at most 96 characters"
        ) from None


def upload(folder: Path, name: str, *, private: bool | None = None) -> str:
    """Send an export to a model repository, which is made where there is none; gives its address.

    An earlier export there is replaced. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        folder: what is sent.
        name: of the repository, [OWNER/]NAME.
        private: True: nobody else may see it; None: as its owner's settings say.

    Raises:
        UserError: it can't be sent; says why, and how to send the folder later.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    check_repository(name)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = huggingface_hub.HfApi(library_name="gvpo-jax")
    kept_here = [MARKER] if _names_a_place(folder, MARKER, "start_model") else []
    by_hand = shlex.join(["hf", "upload", name, str(folder)])
    by_hand += " --private" * bool(private) + f" . --exclude {MARKER}" * bool(kept_here)
    try:
        if huggingface_hub.get_token() is None:
            raise UserError(_LOG_IN)
        if _names_a_place(folder, "adapter_config.json", "base_model_name_or_path"):
            raise UserError(_BASE)
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repository).private:
            raise _Public(
                "that repository is there already, and public: make it private in its settings, "
                "or give another name"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export of gvpo-jax",
            delete_patterns=list(_STALE),
            ignore_patterns=kept_here,
        )
    except Exception as error:  # of the network, of the hub, of one of the package's own kinds
        told = f"{name} was not sent to the hub: {_reason(error)}; the export stays in {folder}"
        later = "" if isinstance(error, _Public) else f", and {by_hand} sends it too"
        raise UserError(told + later) from error
    return f"{api.endpoint}/{repository}"


class _Public(UserError):
    """What shall be private would be seen by all: no command that sends it is told."""


_LOG_IN = "you are not logged in: hf auth login, or HF_TOKEN, with a token that may write"
_BASE = (
    "its adapter_config.json names the base by a path of this machine, where nobody else finds it: "
    "give base_model_name_or_path the base's name on the hub"
)


def _names_a_place(folder: Path, file: str, key: str) -> bool:
    """Whether a file of an export says where on this machine, or in a bucket, its base lies."""
    base = (read_json(folder / file) or {}).get(key)
    if not isinstance(base, str) or base.startswith("package://"):
        return False
    return Path(base).is_absolute() or is_address(base) or not _HUB_NAME.fullmatch(base)


def _reason(error: BaseException) -> str:
    """What went wrong, and how to mend it."""
    import huggingface_hub

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, huggingface_hub.errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    while error.__cause__ is not None and _status(error) is None:
        error = error.__cause__  # the package says "Error while uploading" of them all
    status, told = _status(error), " ".join(str(error).split())[:160].rstrip(".")
    if status is None:
        return f"the hub can't be reached, or broke off ({told}): try again when it can"
    if status in (401, 404):  # 404: of what the token may not see
        return f"your token is not accepted there ({status}): hf auth login with one that may write"
    if status == 403:
        return (
            "you may not write there (403): give a name of your own, or a token that may write to "
            "that owner's repositories"
        )
    if status == 409:
        return "it is taken, or something else is being written there (409): try again, or rename"
    return f"the hub says {status} ({told}): try again" + (" later" if status >= 500 else "")


def _status(error: BaseException) -> int | None:
    """That of the HTTP answer which an error is about."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None
