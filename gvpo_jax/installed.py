"""Whether the trainer's packages are there: the loss needs nothing but jax, the trainer more."""

import functools
import importlib.metadata
import importlib.util
import math

from gvpo_jax.errors import UserError

_INSTALL = "pip install -U 'gvpo-jax[train]'"


class NotInstalled(UserError, ImportError):
    """A package is missing, too old, or does not go with another."""


@functools.cache
def check_trainer() -> None:
    """Look at the versions of what the extra `train` asks for.

    A version newer than the extra allows is taken: it may work.

    Raises:
        NotInstalled: one is missing or too old, or two are known not to work together.
    """
    missing, old, found = [], [], {}
    for name, least in _asked_for().items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if least and _numbers(found[name]) < _numbers(least):
            old.append(f"{name} {least} or newer (here: {found[name]})")
    if missing:
        more = f" and {len(missing) - 3} more" if missing[3:] else ""
        names = ", ".join(missing[:3]) + more
        raise NotInstalled(f"gvpo-jax is here without its trainer ({names} missing): {_INSTALL}")
    if old:
        raise NotInstalled(f"gvpo-jax's trainer needs {', '.join(old)}: {_INSTALL}")
    jax, flax = found.get("jax", ""), found.get("flax", "")
    if jax in ("0.11.1", "0.11.2") and _numbers(flax) <= (0, 12, 9):
        raise NotInstalled(f"jax {jax} does not work with flax {flax}: pip install -U flax")


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
