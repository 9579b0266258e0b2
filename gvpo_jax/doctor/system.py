"""Versions, devices, memory, disks and extras: what a machine has for every run."""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import gvpo_jax
from gvpo_jax import installed, machine
from gvpo_jax.doctor.findings import Finding
from gvpo_jax.errors import Page, UserError

_GIB = 2**30
_LEAST_FREE = 2**30  # on a disk that is written to
_SECONDS = 120  # in which JAX has to tell its devices
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("numpy", "ml-dtypes", "chex"),
)


def versions() -> Iterator[Finding]:
    """Of Python and the packages, and which do not go together."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("versions", "Python", f"{platform.python_version()}, {system}")
    yield Finding("versions", "gvpo-jax", gvpo_jax.__version__)
    for package in _PACKAGES:
        version = installed.version_of(package)
        if version is not None:
            yield Finding("versions", package, version)
    try:
        installed.check_trainer.__wrapped__()
        yield Finding("versions", "trainer", "all that it needs is there")
    except installed.NotInstalled as error:
        absent = "is here without its trainer" in str(error)  # the loss alone may be what is wanted
        level = "note" if absent else "problem"
        value = "not installed; the loss works without it" if absent else "not usable"
        yield Finding("versions", "trainer", value, level, str(error), error.page)
    jaxlib = installed.version_of("jaxlib")
    for package in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        plugin = installed.version_of(package)
        if plugin is not None and plugin != jaxlib:
            extra = package.split("-")[1]
            yield Finding(
                "versions",
                "CUDA plugin",
                f"{package} {plugin} is not of jaxlib {jaxlib}",
                "problem",
                f"pip install -U 'jax[{extra}]'",
                Page.VERSIONS,
            )
    if (wanted := _libtpu_wanted()) and (libtpu := installed.version_of("libtpu")):
        pattern = re.escape(wanted).replace(r"\*", r".*")
        if not re.fullmatch(pattern, libtpu):
            yield Finding(
                "versions",
                "libtpu",
                f"{libtpu} is not the one that this jax names, {wanted}",
                "note",
                "pip install -U 'jax[tpu]' brings the libtpu that belongs to this jax",
                Page.VERSIONS,
            )


def _libtpu_wanted() -> str | None:
    """The version that jax's own extra `tpu` asks for, such as 0.0.42.*."""
    for line in requires("jax") or []:
        if match := re.match(r"libtpu *\(?== *([\w.*+]+)", line):
            return match[1]
    return None


# In a process of its own: what JAX starts on may hang, or end the process.
_ASK = """
import json, jax
print("devices " + json.dumps([
    {"kind": x.device_kind, "platform": x.platform, "host": x.process_index,
     "bytes": (x.memory_stats() or {}).get("bytes_limit") if x.platform != "cpu" else None}
    for x in jax.devices()]))
"""


def ask_devices() -> list[dict[str, Any]]:
    """JAX's devices: kind, platform, host, and bytes of memory, where it is known.

    Raises:
        UserError: JAX can't start on them, or does not answer.
    """
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-P", "-c", _ASK]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=_SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"JAX did not tell its devices within {_SECONDS} s; on a slice of several hosts it "
                "waits for the others",
                page=Page.DEVICES,
            ) from None
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    for line in done.stdout.splitlines():
        if line.startswith("devices "):
            return json.loads(line.removeprefix("devices "))
    reason = said[-1] if said else f"its process ended with status {done.returncode}"
    raise UserError(f"JAX can't start: {reason}", page=Page.DEVICES)


def devices() -> Iterator[Finding]:
    """Accelerators that are there, and those that JAX sees."""
    chips, gpus = machine.tpu_chips(), machine.nvidia_gpus()
    if chips:
        yield Finding("devices", "TPU chips", f"{len(chips)} ({chips[0]})")
    for gpu in gpus:
        yield Finding("devices", "GPU", gpu)
    busy = [pid for pid in machine.holders(machine.TPU_LOCK) or [] if pid != os.getpid()]
    if busy and chips:
        which = f"process {busy[0]}" if busy[0] > 0 else "another process"
        yield Finding(
            "devices",
            "TPU in use",
            f"by {which}",
            "problem",
            f"one process at a time can use a TPU: end {which}",
            Page.DEVICES,
        )
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        yield Finding("devices", "JAX_PLATFORMS", platforms)
    try:
        there = ask_devices()
    except UserError as error:
        yield Finding("devices", "jax", str(error), "problem", _cure(platforms), error.page)
        return
    kinds: dict[tuple[Any, ...], int] = {}
    for device in there:
        key = device["platform"], device["kind"], device["bytes"]
        kinds[key] = kinds.get(key, 0) + 1
    for (backend, kind, size), count in kinds.items():
        memory = f", {size / _GIB:.3g} GiB each" if size else ""
        yield Finding("devices", "jax", f"{count} x {backend} ({kind}){memory}")
    yield from _unused({device["platform"] for device in there}, chips, gpus, platforms)


def _cure(platforms: str) -> str:
    asked = platforms.split(",")
    for backend, extra in (("tpu", "tpu"), ("cuda", "cuda13"), ("gpu", "cuda13")):
        if backend in asked:
            return f"pip install -U 'jax[{extra}]', or use the processor: JAX_PLATFORMS=cpu"
    return "see whether the processor alone works: JAX_PLATFORMS=cpu"


def _unused(
    platforms: set[str], chips: Sequence[str], gpus: Sequence[str], asked: str
) -> Iterator[Finding]:
    """Accelerators that are there and that JAX does not see."""
    cuda = any(installed.version_of(f"jax-cuda{x}-plugin") for x in (12, 13))
    for name, there, seen, package, extra in (
        ("TPU", chips, "tpu" in platforms, installed.version_of("libtpu"), "tpu"),
        ("GPU", gpus, bool({"gpu", "cuda"} & platforms), cuda, "cuda13"),
    ):
        if not there or seen:
            continue
        if asked and not {name.lower(), "cuda" if name == "GPU" else "tpu"} & set(asked.split(",")):
            value, level = f"there, and left out by JAX_PLATFORMS={asked}", "note"
            remedy = f"take JAX_PLATFORMS out of the environment to use the {name}"
        elif package:
            value, level = (
                "there, and JAX does not see it, though its plugin is installed",
                "problem",
            )
            remedy = (
                "another process may hold it, or its driver is too old or not for this user: "
                'python -c "import jax; print(jax.devices())" says more'
            )
        else:
            value, level = "there, and this JAX is for processors alone", "problem"
            remedy = f"pip install -U 'jax[{extra}]'"
        yield Finding("devices", f"{name} unused", value, level, remedy, Page.DEVICES)


def this_machine() -> Iterator[Finding]:
    """Memory, disks that are written to, and whether the hub is offline."""
    memory = machine.host_memory()
    told = "unknown" if memory is None else f"{memory / _GIB:.3g} GiB"
    yield Finding("machine", "memory", f"{told}, {os.cpu_count()} processors")
    yield from place("machine", "here", Path(), "runs are written here", "give another run.dir")
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/gvpo-jax"
    for name, folder, remedy in (
        (
            "compiled programs",
            compiled,
            "all is compiled at each start: give run.compilation_cache another folder",
        ),
        ("Hugging Face cache", _hub_cache(), "set HF_HOME to a folder that can be written"),
    ):
        path = _expanded(folder)
        if path is None:
            yield Finding("machine", name, f"{folder}: there is no home folder", "note", remedy)
            continue
        yield from place("machine", name, path, str(folder), remedy, needed=False)
    if offline():
        yield Finding(
            "machine",
            "Hugging Face hub",
            "offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)",
            "note",
            "only models and datasets that are in the cache can be used",
            Page.MODELS,
        )


def place(
    section: str, name: str, path: Path, shown: str, remedy: str, *, needed: bool = True
) -> Iterator[Finding]:
    """A folder that is written to: what is free there, and whether it can be written.

    needed: nothing works without; else it is a note.
    """
    level = "problem" if needed else "note"
    try:
        free = machine.free_disk(path)
    except OSError as error:
        yield Finding(section, name, f"{shown}: {error.strerror or error}", level, remedy)
        return
    told = f"{shown}: {free / _GIB:.3g} GiB free"
    if why := machine.why_not_writable(path):
        yield Finding(section, name, f"{told}, can't be written ({why})", level, remedy)
    elif free < _LEAST_FREE:
        yield Finding(section, name, told, level, f"too little room on the disk; {remedy}")
    else:
        yield Finding(section, name, told)


def offline() -> bool:
    """Whether Hugging Face's libraries are told not to use the network."""
    on = {"1", "true", "yes", "on"}
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in on for name in names)


def _hub_cache() -> str:
    """Where Hugging Face's libraries keep models."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return cache
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(os.environ.get("HF_HOME") or os.path.join(base, "huggingface"), "hub")


def _expanded(folder: str) -> Path | None:
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # there is no home
        return None


def extras() -> Iterator[Finding]:
    """Which extras are installed, and what each is for."""
    for extra, (_, purpose) in installed.EXTRAS.items():
        there = installed.has_extra(extra)
        how = "installed" if there else f"not installed: pip install 'gvpo-jax[{extra}]'"
        yield Finding("extras", extra, f"{purpose}; {how}")
