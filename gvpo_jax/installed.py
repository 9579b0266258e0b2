"""What is installed: the loss needs nothing but jax, the trainer and the extras more."""

import functools
import importlib.metadata
import importlib.util
import math
from pathlib import Path

from gvpo_jax.errors import Page, UserError

_INSTALL = "pip install -U 'gvpo-jax[train]'"

# Where the files of configs/ are: in the wheel, and in a checkout.
PACKAGED = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")

# The extras for those who use gvpo-jax: a module that each brings, and what it is for.
EXTRAS = {
    "train": ("transformers", "the trainer and the command line"),
    "gguf": ("gguf", "models in GGUF files"),
    "gcs": ("gcsfs", "runs, models and rows in Google Cloud Storage"),
    "qlora": ("qwix", "adapters beside a model in 8 or 4 bits"),
    "servers": ("httpx2", "sampling on vLLM or SGLang"),
    "tasks": ("reasoning_gym", "generated tasks"),
    "hub": ("datasets", "datasets of the Hugging Face hub"),
    "math": ("math_verify", "rewards for mathematics"),
    "parquet": ("pyarrow", "rows in Parquet files"),
    "tensorboard": ("tensorboardX", "TensorBoard files"),
    "wandb": ("wandb", "metrics in Weights & Biases"),
    "trackio": ("trackio", "metrics in trackio"),
    "compile": ("libtpu", "gvpo-jax compile, without a TPU"),
    "tunix": ("tunix", "the loss in Tunix"),
}


class NotInstalled(UserError, ImportError):
    """A package is missing, too old, or does not go with another."""

    page = Page.EXTRAS


@functools.cache
def check_trainer() -> None:
    """Look at the versions of what the extra `train` asks for.

    A version newer than the extra allows is taken: it may work.

    Raises:
        NotInstalled: one is missing or too old, or two are known not to work together.
    """
    asked = _asked_for()
    found = {name: version for name in asked if (version := version_of(name)) is not None}
    missing = [name for name in asked if name not in found]
    old = [
        f"{name} {asked[name]} or newer (here: {version})"
        for name, version in found.items()
        if asked[name] and _numbers(version) < _numbers(asked[name])
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if missing[3:] else ""
        names = ", ".join(missing[:3]) + more
        raise NotInstalled(f"gvpo-jax is here without its trainer ({names} missing): {_INSTALL}")
    if old:
        raise NotInstalled(f"gvpo-jax's trainer needs {', '.join(old)}: {_INSTALL}")
    jax, flax = found.get("jax", ""), found.get("flax", "")
    if jax in ("0.11.1", "0.11.2") and _numbers(flax) <= (0, 12, 9):
        raise NotInstalled(
            f"jax {jax} does not work with flax {flax}: pip install -U flax", page=Page.VERSIONS
        )


def version_of(package: str) -> str | None:
    """The version that is installed of a package; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_extra(extra: str) -> bool:
    """Whether the module that an extra brings is there; nothing is imported."""
    return is_installed(EXTRAS[extra][0])


def is_installed(module: str) -> bool:
    """Whether a package can be imported; a folder of its name that lies about is none.

    wandb leaves such a folder, which Python takes for a package without code.
    """
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def _asked_for() -> dict[str, str]:
    """The packages of the extra `train`, and their lowest versions."""
    try:
        lines = importlib.metadata.requires("gvpo-jax") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source, without installing it
        return dict.fromkeys(("flax", "optax", "orbax-checkpoint", "pyyaml", "transformers"), "")
    if importlib.util.find_spec("packaging") is None:
        raise NotInstalled(f"gvpo-jax is here without its trainer: {_INSTALL}")
    from packaging.requirements import Requirement

    asked = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker and marker.evaluate({"extra": "train"}) and not marker.evaluate({"extra": ""}):
            least = [s.version for s in requirement.specifier if s.operator == ">="]
            asked[requirement.name] = least[0] if least else ""
    return asked


def _numbers(version: str) -> tuple[float, ...]:
    """What versions are compared by; one that says nothing counts as new."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(str(version)).release
    except InvalidVersion:
        return (math.inf,)
    return release if any(release) else (math.inf,)
