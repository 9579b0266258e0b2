"""What of a config will not work here: its model, its files, its devices and their memory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_jax.buckets import is_address
from gvpo_jax.doctor.findings import Finding
from gvpo_jax.doctor.functions import about_functions
from gvpo_jax.doctor.system import offline, place
from gvpo_jax.errors import Page, UserError

if TYPE_CHECKING:  # without the trainer's packages there is no config, and this says so
    from gvpo_jax.config import Config

_GIB = 2**30
_NAMES = ("data.path", "data.eval_path", "data.groups_path")


def about_config(load: Callable[[], Any], *, with_devices: bool) -> Iterator[Finding]:
    """Look at a config; nothing if there is none. No weights are read, nothing is downloaded.

    Args:
        load: gives the config, or None; may raise UserError.
        with_devices: whether JAX can start, so that memory can be looked at.
    """
    try:
        config = load()
    except UserError as error:
        yield _refused("config", error)
        return
    if config is None:
        return
    from gvpo_jax.config import check_extras

    try:
        check_extras(config)
    except UserError as error:
        yield _refused("extras", error)
    yield from _files(config)
    yield from about_functions(config)
    free = None
    if is_address(config.run.dir):
        yield Finding("config", "run.dir", "in a bucket, which is asked when the run starts")
    else:
        found = list(place("config", "run.dir", config.run.folder, config.run.dir, _ELSEWHERE))
        yield from found
        free = config.run.folder if found[0].level == "ok" else None
    shape = yield from _model(config)
    if shape is not None and with_devices:
        yield from _memory(config, shape, free)


_ELSEWHERE = "give another run.dir"


def _refused(name: str, error: UserError) -> Finding:
    return Finding("config", name, "not usable", "problem", str(error), error.page)


def _files(config: "Config") -> Iterator[Finding]:
    """Rows that are on this machine: whether the files are there."""
    from gvpo_jax.data.files import files_of
    from gvpo_jax.data.hub import is_hub_name

    data = config.data
    named = list(zip(_NAMES, (data.path, data.eval_path, data.groups_path), strict=True))
    named += [(f"eval.sets.{n}.path", each.path) for n, each in enumerate(config.eval.sets)]
    for name, path in named:
        if path is None or is_address(path):
            continue
        if is_hub_name(path):
            yield Finding("config", name, f"{path}: looked for on the hub when the run starts")
            continue
        try:
            files = list(files_of(Path(path)))
            if gone := [file for file in files if not os.path.isfile(file)]:
                raise UserError(f"{gone[0]}: there is no such file")
            yield Finding("config", name, f"{path} ({len(files)} files)" if files[1:] else path)
        except UserError as error:
            error.explain(Page.ROWS)
            yield _refused(name, error)


def _model(config: "Config"):
    """Findings; returns the decoder's shape, None where it is not known."""
    from gvpo_jax.models.known import model_shape
    from gvpo_jax.models.load import local_path

    name = config.model.name
    if is_address(name):
        yield Finding("config", "model", f"{name}: copied when the run starts")
        return None
    try:
        path = None if name == "debug" else local_path(name)
        if name == "debug" or path is not None:
            shape = model_shape(name)
            yield Finding("config", "model", f"{name}: it is here")
            return shape
    except UserError as error:
        error.explain(Page.MODELS)
        yield _refused("model", error)
        return None
    folder = yield from _of_hub(name)
    try:
        return model_shape(name, None if folder is None else str(folder))
    except UserError as error:
        if folder is not None:
            yield _refused("model", error)
        else:
            yield Finding("config", "memory", "not known until the model is downloaded", "note")
        return None


def _of_hub(name: str):
    """Findings; returns the folder of a model in the cache, None where it is not there."""
    import huggingface_hub

    try:
        file = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except Exception as error:  # no name can be like that
        refused = UserError(
            f"{name} is no folder, no .gguf file and no name on the Hugging Face hub: {error}",
            page=Page.MODELS,
        )
        yield _refused("model", refused)
        return None
    folder = Path(file).parent if isinstance(file, str) else None
    if folder is not None and any(folder.glob("*.safetensors")):
        yield Finding("config", "model", f"{name}: it is in the cache")
    elif offline():
        remedy = f"run hf download {name} while online, and without HF_HUB_OFFLINE"
        value = f"{name}: it is not in the cache, and the hub is offline"
        yield Finding("config", "model", value, "problem", remedy, Page.MODELS)
    else:
        value = f"{name}: it must be downloaded"
        remedy = f"it is downloaded when the run starts; hf download {name} does so now"
        yield Finding("config", "model", value, "note", remedy, Page.MODELS)
    return folder


def _memory(config: "Config", shape: Any, run: Path | None) -> Iterator[Finding]:
    """Whether it fits on the devices, and its checkpoints on the disk."""
    from gvpo_jax import machine
    from gvpo_jax.memory import estimate
    from gvpo_jax.parallel.layout import check_batch
    from gvpo_jax.tpu_compile.lowering import batch_sizes

    name = "mesh"
    try:
        mesh = config.mesh.mesh()
        yield Finding("config", name, ", ".join(f"{k}={v}" for k, v in mesh.shape.items()))
        name = "batch"
        part = batch_sizes(config)["score"]
        what = f"train.batch_size / train.micro_batches = {part.groups}"
        check_batch(mesh, part.groups, part.k, what)
    except UserError as error:
        yield _refused(name, error)
        return
    need = estimate(config, shape, mesh, trains=True)
    told, available = need.told(config.model.name), need.available
    if available is None or need.peak <= available:
        yield Finding("config", "memory", told)
    else:
        level = "problem" if need.kept > available else "note"
        value = f"{need.peak / _GIB:.3g} GiB or more of {available / _GIB:.3g} on each device"
        yield Finding("config", "memory", value, level, told, Page.MEMORY)
    if run is None or config.model.lora.rank is not None:
        return
    saved = need.kept
    if config.reference.name != "initial":  # that one is loaded again
        saved += need.items["reference"]
    size = saved * mesh.size // mesh.shape["data"]
    wanted, free = size * (config.checkpoint.keep + 1), machine.free_disk(run)
    value = f"about {size / _GIB:.3g} GiB each, of {free / _GIB:.3g} GiB free"
    if free < wanted:
        yield Finding(
            "config",
            "checkpoints",
            value,
            "problem" if free < size else "note",
            f"checkpoint.keep={config.checkpoint.keep} and the one that is written take "
            f"{wanted / _GIB:.3g} GiB: make room, or {_ELSEWHERE}",
            Page.RESUMING,
        )
    else:
        yield Finding("config", "checkpoints", value)
