"""Whether a run fits into memory, estimated from shapes before weights are read.

`gvpo-jax compile` knows better, for TPUs: it asks the compiler.
"""

import contextlib
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvpo_jax.config import Config
from gvpo_jax.errors import UserError
from gvpo_jax.logprobs import CHUNK_BYTES
from gvpo_jax.models.decoder import DecoderConfig, param_shapes
from gvpo_jax.parallel.distributed import is_first
from gvpo_jax.parallel.layout import group_shards, shapes_on
from gvpo_jax.tpu_compile.lowering import batch_sizes, device_bytes

_GIB = 2**30
# What makes each item smaller.
_SMALLER = {
    "parameters": "a smaller model, or more devices along mesh.fsdp",
    "optimizer state": "optimizer.name=adafactor or sgd, or more devices along mesh.fsdp",
    "gradients": "a smaller model, or more devices along mesh.fsdp",
    "reference": "model.dtype=bfloat16, or more devices along mesh.fsdp",
    "keys and values": "rollout.slots, or a shorter rollout.max_completion_length",
    "activations": "train.micro_batches, or model.remat=layer",
}


def check_memory(config: Config, model: DecoderConfig, mesh: Mesh, *, trains: bool) -> None:
    """Show a warning where a run may need more than there is.

    Args:
        config: of the run.
        model: the decoder.
        mesh: the devices.
        trains: whether there will be updates; else parameters and sampling alone count.

    Raises:
        UserError: the parameters, with the optimizer state if it trains, can't fit.
    """
    available = device_memory(mesh)
    if available is None:
        return
    items = memory_needed(config, model, mesh)
    if not trains:
        items = {name: items[name] for name in ("parameters", "keys and values")}
    kept = items["parameters"] + items.get("optimizer state", 0)
    needed, largest = sum(items.values()), max(items, key=lambda name: items[name])
    there = f"a device has {available / _GIB:.3g} GiB"
    if kept > available:
        largest = max(("parameters", "optimizer state"), key=lambda name: items.get(name, 0))
        raise UserError(
            f"{config.model.name} does not fit: parameters and optimizer state alone need "
            f"{kept / _GIB:.3g} GiB on each device, {there}; smaller with {_SMALLER[largest]}"
        )
    if needed > available and is_first():
        print(
            f"gvpo-jax: warning: this run may not fit: it needs about {needed / _GIB:.3g} GiB on "
            f"each device, {there}; the largest part are {largest} "
            f"({items[largest] / _GIB:.3g} GiB): smaller with {_SMALLER[largest]}",
            file=sys.stderr,
            flush=True,
        )


def memory_needed(config: Config, model: DecoderConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes on one device, by item: exact for what lies there, rough for what comes and goes."""
    params = param_shapes(model)
    optimizer = config.optimizer.create(config.train.updates)
    parameters = device_bytes(shapes_on(mesh, params))
    half = config.model.dtype == "bfloat16"
    copied = 2 if half and config.reference.name != "ema" else 1
    lookahead = parameters if config.rollout.lookahead else 0
    return {
        "parameters": parameters + lookahead,
        "optimizer state": device_bytes(shapes_on(mesh, jax.eval_shape(optimizer.init, params))),
        "gradients": parameters,
        "reference": parameters // copied,
        "keys and values": _cache(config, model) // group_shards(mesh),
        "activations": _activations(config, model) // group_shards(mesh),
    }


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that each device of this process has; processors share the machine's. None: unknown."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", file).read_text()))
    return min(found) // len(mesh.local_devices) if found else None


def _cache(config: Config, model: DecoderConfig) -> int:
    if config.servers.kind != "none" or config.data.groups_path:
        return 0
    sizes, slots = batch_sizes(config)["rollout"], config.rollout.slots
    rows = min(sizes.groups * sizes.k, slots or sizes.groups * sizes.k)
    kept = config.rollout.cache_dtype
    width = jnp.dtype(config.model.dtype if kept == "model" else kept).itemsize
    tokens = sizes.groups * sizes.p + rows * sizes.t
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width * tokens


def _activations(config: Config, model: DecoderConfig) -> int:
    """What a forward pass of a micro-batch keeps for the backward one, and a chunk of logits."""
    sizes, train = batch_sizes(config)["score"], config.train
    tokens = sizes.groups * (sizes.p + sizes.k * sizes.t // train.completion_parts)
    d, heads = model.hidden_size, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_layer = {
        "none": 6 * d + 2 * heads + 4 * model.intermediate_size,
        "dots": 3 * d + heads + 2 * model.intermediate_size,
        "layer": d,
    }[config.model.remat]
    width = jnp.dtype(config.model.dtype).itemsize
    logits = min(4 * tokens * model.vocab_size, CHUNK_BYTES)
    return tokens * model.num_layers * per_layer * width + logits
