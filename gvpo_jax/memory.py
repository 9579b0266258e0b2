"""Whether a run fits into memory, estimated from shapes before weights are read.

`gvpo-jax compile` knows better, for TPUs: it asks the compiler.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvpo_jax.config import Config
from gvpo_jax.errors import Page, UserError
from gvpo_jax.logprobs import CHUNK_BYTES
from gvpo_jax.machine import host_memory
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.lora import Params
from gvpo_jax.models.reward_model import open_reward_model
from gvpo_jax.models.stacking import stacking_of
from gvpo_jax.parallel.distributed import is_first
from gvpo_jax.parallel.layout import group_shards, shapes_on
from gvpo_jax.tpu_compile.lowering import batch_sizes, device_bytes, merged_bytes

_GIB = 2**30
# What makes each item smaller.
_SMALLER = {
    "parameters": "a smaller model, or more devices along mesh.fsdp",
    "optimizer state": "optimizer.name=adafactor or sgd, or more devices along mesh.fsdp",
    "gradients": "a smaller model, or more devices along mesh.fsdp",
    "reference": "model.dtype=bfloat16, or more devices along mesh.fsdp",
    "merged weights": "rollout.adapter=apart",
    "keys and values": "rollout.slots, or a shorter rollout.max_completion_length",
    "stacked layers": "model.scan_layers=false",
    "reward models": "rewards.model.dtype=bfloat16, or a server, see LLMJudge",
    "activations": "train.micro_batches, or model.remat=layer",
}


def check_memory(config: Config, model: DecoderConfig, mesh: Mesh, *, trains: bool) -> None:
    """Show a warning where a run may need more than there is.

    Args:
        config: of the run.
        model: the decoder.
        mesh: the devices.
        trains: whether there will be updates; else what they need does not count.

    Raises:
        UserError: the parameters, with the optimizer state if it trains, can't fit.
    """
    need = estimate(config, model, mesh, trains=trains)
    if need.available is None:
        return
    if need.kept > need.available:
        raise UserError(need.told(config.model.name), page=Page.MEMORY)
    if need.peak > need.available and is_first():
        told = f"gvpo-jax: warning: {need.told(config.model.name)}"
        print(told, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Need:
    """Bytes on each device: what there is, by item what a run needs, and its largest sums."""

    available: int | None  # None: unknown
    items: Mapping[str, int]
    kept: int  # parameters, and the optimizer state where it trains: what always lies there
    peak: int  # at one time, at least

    def told(self, model: str) -> str:
        """Whether it fits, in a line; where it does not, with what makes it smaller."""
        items, of = self.items, f"it needs {self.peak / _GIB:.3g} GiB or more on each device"
        if self.available is None:
            return f"{of}; what a device has is not known"
        there = f"a device has {self.available / _GIB:.3g} GiB"
        if self.kept > self.available:
            trains = "optimizer state" in items
            kept = [name for name in ("parameters", "optimizer state") if name in items]
            largest = max(kept, key=lambda name: items[name])
            what = "parameters and optimizer state" if trains else "its parameters"
            return (
                f"{model} does not fit: {what} alone need {self.kept / _GIB:.3g} GiB on each "
                f"device, {there}; smaller with {_SMALLER[largest]}"
            )
        if self.peak <= self.available:
            return f"{of}, {there}"
        largest = max(items, key=lambda name: items[name])
        return (
            f"this run may not fit: {of}, {there}; the largest part are {largest} "
            f"({items[largest] / _GIB:.3g} GiB): smaller with {_SMALLER[largest]}"
        )


def estimate(config: Config, model: DecoderConfig, mesh: Mesh, *, trains: bool) -> Need:
    """What a run needs, see `check_memory`."""
    available = device_memory(mesh)
    items = memory_needed(config, model, mesh, trains=trains)
    kept = items["parameters"] + items.get("optimizer state", 0)
    return Need(available, items, kept, peak(items, together=bool(config.rollout.lookahead)))


def memory_needed(
    config: Config, model: DecoderConfig, mesh: Mesh, *, trains: bool = True
) -> dict[str, int]:
    """Bytes on one device, by item: exact for what lies there, at least so many for the rest."""
    frozen, params = config.model.param_shapes(model)
    optimizer = config.optimizer.create(config.train.updates)
    base, trained = (device_bytes(shapes_on(mesh, tree)) for tree in (frozen, params))
    half = config.model.dtype == "bfloat16"
    copied = 2 if half and config.reference.name != "ema" else 1
    sampled, data = [0], config.data
    if config.judges_rows:
        eval_ = config.eval
        sampled += [_cache(config, model, mesh, eval_.batch_size, eval_.most_generations)]
    if trains and not data.groups_path and config.loss.name != "sft":
        rollout = batch_sizes(config)["rollout"]
        sampled += [_cache(config, model, mesh, rollout.groups, rollout.k)]
    kept = {
        "parameters": base + trained,
        "reference": trained // copied,
        "keys and values": max(sampled),
    }
    if max(sampled) and (merged := merged_bytes(config, mesh, frozen, params)):
        kept["merged weights"] = merged
    if judging := _reward_models(config, mesh):
        kept["reward models"] = judging
    if not trains:
        return kept
    if stacked := _stacked(config, model, mesh, frozen, params):
        kept["stacked layers"] = stacked
    return kept | {
        "parameters": base + (2 * trained if config.rollout.lookahead else trained),
        "optimizer state": device_bytes(shapes_on(mesh, jax.eval_shape(optimizer.init, params))),
        "gradients": trained * min(config.train.micro_batches, 2),  # a part's, and their sum
        "activations": _activations(config, model, mesh),
    }


def peak(items: Mapping[str, int], *, together: bool) -> int:
    """Bytes of `memory_needed` that are there at one time.

    together: a rollout is sampled while the policy trains; else one comes after the other.
    """
    sampling = items["keys and values"] + items.get("merged weights", 0)
    training = sum(items.get(x, 0) for x in ("gradients", "activations", "stacked layers"))
    beside = sum(items.values()) - sampling - training
    return beside + (sampling + training if together else max(sampling, training))


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that each device of this process has; processors share the machine's. None: unknown."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = host_memory()
    return None if found is None else found // len(mesh.local_devices)


def _cache(config: Config, model: DecoderConfig, mesh: Mesh, groups: int, k: int) -> int:
    """On one device, of so many prompts with k completions each, sampled at once in this process.

    Groups are cut over the devices, and heads along `tensor` where they divide.
    """
    if config.servers.kind != "none":
        return 0
    data, rollout = config.data, config.rollout
    rows = min(groups * k, rollout.slots or groups * k)
    kept = rollout.cache_dtype
    width = jnp.dtype(config.model.dtype if kept == "model" else kept).itemsize
    tokens = groups * data.max_prompt_length + rows * rollout.max_completion_length
    tensor = rollout.tensor or mesh.shape["tensor"]
    own = (model.heads(i) for i in range(model.num_layers) if model.source(i) is None)
    features = sum(n * d // (1 if n % tensor else tensor) for n, d in own)
    return 2 * features * width * tokens // (mesh.size // tensor)


def _reward_models(config: Config, mesh: Mesh) -> int:
    """Weights on one device, of those in folders; they are cut over the devices of a process."""
    folders = [spec for spec in config.rewards.funcs if os.path.isdir(spec)]
    weights = sum(open_reward_model(folder).weights for folder in folders)
    devices = max(mesh.size // jax.process_count(), 1)  # also where these are only described
    return weights * jnp.dtype(config.rewards.model.dtype).itemsize // devices


def _stacked(config: Config, model: DecoderConfig, mesh: Mesh, *trees: Params) -> int:
    """The copy of the layers that an update scans over."""
    if not config.model.scan_layers:
        return 0
    stacking = stacking_of(model, jnp.dtype(config.model.dtype))
    layers = [{"layers": tree["layers"]} for tree in trees if "layers" in tree]
    stacked = [jax.eval_shape(stacking.stack, x) for x in layers]
    return device_bytes(shapes_on(mesh, stacked))


def _activations(config: Config, model: DecoderConfig, mesh: Mesh) -> int:
    """What a forward pass of a micro-batch keeps for the backward one, and a chunk of logits.

    On one device. Where layers are computed again, one of them is there whole.
    """
    sizes, train = batch_sizes(config)["score"], config.train
    tokens = sizes.groups * (sizes.p + sizes.k * sizes.t // train.completion_parts)
    tensor = mesh.shape["tensor"]  # along which heads and what is inside an MLP are cut
    d, inner = model.hidden_size, model.inner_width // tensor
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor
    whole = 6 * d + 2 * heads + 4 * inner
    per_layer = {
        "none": whole,
        "dots": 3 * d + heads + 2 * inner,
        "layer": d,
    }[config.model.remat]
    again = whole - per_layer
    width = jnp.dtype(config.model.dtype).itemsize
    logits = min(4 * tokens * model.vocab_size, CHUNK_BYTES)
    kept = tokens * (model.num_layers * per_layer + again) * width + logits
    return kept // group_shards(mesh)
