"""A run's programs, lowered from shapes alone: no weights, no live devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvpo_jax.config import Config
from gvpo_jax.data.batch import Batch, Sizes
from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.hf_config import check_length
from gvpo_jax.models.lora import Params, merge
from gvpo_jax.models.quantized import is_quantized
from gvpo_jax.parallel.layout import (
    batch_shardings,
    check_batch,
    fill_up,
    group_shards,
    lanes,
    replicated,
    shapes_on,
)
from gvpo_jax.parallel.mesh import check_hosts
from gvpo_jax.rollout.inprocess import SamplingModel, compiled, prefill
from gvpo_jax.rollout.make import sampling_model

_STOP_IDS = (0, 1)  # which they are changes no size


@dataclass(frozen=True)
class Program:
    """One compiled function of a run."""

    name: str  # what it does
    lower: Callable[[], jax.stages.Lowered]  # traces it for its mesh
    beside: int  # bytes on a device that it does not touch but that lie there meanwhile
    loop: int  # how often its main loop's body runs: micro-batches, or tokens; 1: there is none
    # Bytes that a device reads in each round of that loop, where known better than XLA counts them.
    reads: int | None = None


def batch_sizes(config: Config) -> dict[str, Sizes]:
    """The largest batch that each program is given: "train", "score" and "rollout"."""
    c = config
    longest = -(-c.data.max_prompt_length // 8) * 8  # as `pad_prompts` rounds
    t, k = c.rollout.max_completion_length, c.rollout.num_generations
    k = 1 if c.loss.name == "sft" else k  # each text is a group of its own
    part = max(c.train.batch_size // c.train.micro_batches, 1)
    new = (c.train.batch_size - c.replay.groups) * c.train.steps_per_generation
    drawn = k - c.rollout.demonstrations - c.replay.completions
    return {
        "train": Sizes(c.train.batch_size, k, longest, t),
        "score": Sizes(part, k, longest, t),
        "rollout": Sizes(new, drawn, longest, t),
    }


def run_programs(config: Config, model: DecoderConfig, mesh: Mesh) -> list[Program]:
    """Update, scoring by the reference, prefill and decoding, as a `Policy` compiles them.

    For completions of full length, so that there is no padding to leave out. Without the last two
    where servers sample.

    Raises:
        UserError: a batch or a parameter does not divide over the mesh, or the lengths are more
            than the model was made for.
    """
    sizes = batch_sizes(config)
    check_hosts(mesh, "mesh.tensor")
    part, k = sizes["score"].groups, sizes["score"].k
    check_batch(mesh, part, k, f"train.batch_size / train.micro_batches = {part}")
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    check_length(model.max_position_embeddings, longest, "the model")
    functions = config.model.functions(model, mesh, config.rollout.cache_dtype)
    frozen, trained = (shapes_on(mesh, tree) for tree in config.model.param_shapes(model))
    programs = config.programs(functions, trained, mesh)
    state = shapes_on(mesh, jax.eval_shape(programs.init, trained))
    reference = shapes_on(mesh, jax.eval_shape(programs.reference, state.params))
    params, all_state, fixed = (device_bytes(x) for x in (state.params, state, reference))
    sampling = sampling_model(config.rollout, config.model, model, mesh, functions)
    ahead, in_process = config.rollout.lookahead, config.servers.kind == "none"
    prepared = jax.eval_shape(sampling.prepare, state.params, frozen)
    weights = shapes_on(sampling.mesh, prepared)
    sampled = device_bytes(weights)
    merged = merged_bytes(config, mesh, frozen, trained)
    copied = sampled if config.rollout.tensor else merged
    lower_prefill, lower_decode, kept, steps = _rollout(config, sampling, weights, sizes["rollout"])
    # A snapshot of the policy; what it samples with and keeps lies there while the policy trains.
    snapshot = params if ahead else 0
    beside = snapshot + (copied + device_bytes(kept) if ahead and in_process else 0)
    batch = Batch(**_arrays(mesh, sizes["train"], Batch._fields))
    scored = _arrays(mesh, sizes["score"], ("prompts", "prompt_lengths", "completions"))
    lower_step = functools.partial(programs.step.lower, state, batch, frozen)
    lower_score = functools.partial(programs.token_logps.lower, reference, scored, frozen=frozen)
    training = [
        Program("train step", lower_step, fixed + beside, config.train.micro_batches),
        Program("reference scoring", lower_score, all_state + beside, 1),
    ]
    if config.loss.name == "sft":
        return training[:1]
    if not in_process:
        return training
    others = all_state + device_bytes(frozen) - (sampled - copied) + fixed + snapshot
    reads = _read_each_step(weights, kept, jnp.dtype(config.model.dtype))
    return [
        *training,
        Program("rollout: prefill", lower_prefill, others, 1),
        Program("rollout: decode", lower_decode, others, steps, reads),
    ]


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of laid out arrays, or of their shapes, on one device."""

    def bits(x: Any) -> int:
        of_each = 4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize
        return math.prod(x.sharding.shard_shape(x.shape)) * of_each

    return sum(map(bits, jax.tree.leaves(tree))) // 8


def merged_bytes(config: Config, mesh: Mesh, frozen: Params, params: Params) -> int:
    """Of the kernels, on one device, that sampling merges an adapter into; 0: it does not."""
    if not frozen or config.rollout.adapter == "apart":
        return 0
    dtype = config.model.dtype
    kernels = jax.eval_shape(lambda w, adapter: merge(w, adapter, 1.0, dtype), frozen, params)
    return device_bytes(shapes_on(mesh, kernels))


def _read_each_step(weights: Any, kept: dict[str, Any], dtype: Any) -> int:
    """Bytes on a device; XLA counts a cache that is updated in place as read and written whole.

    Weights are read in the dtype of the computation, once converted in front of the loop, or
    quantised.
    """
    state, prompts = kept["state"], kept["prompts"]
    looked_up = {"embed"} if "head" in weights else set()
    multiplied = {name: x for name, x in weights.items() if name not in looked_up}
    multiplied = jax.tree.map(
        lambda x: x if is_quantized(x) else x.update(dtype=dtype), multiplied, is_leaf=is_quantized
    )
    prefix = prompts.prefix if state.prefix is None else state.prefix
    return device_bytes((multiplied, state.cache, prefix))


def _rollout(config: Config, sampling: SamplingModel, params, sizes: Sizes):
    """What lowers prefill and decoding, what one leaves to the other, and the steps at most."""
    mesh, model = sampling.mesh, sampling.functions
    groups = fill_up(mesh, sizes.groups, sizes.k)
    size, groups = lanes(groups, sizes.k, config.rollout.slots, group_shards(mesh))
    sizes = dataclasses.replace(sizes, groups=groups)
    steps = groups // size[0] * -(-sizes.k // size[1]) * sizes.t
    options = {"k": sizes.k, "t": sizes.t, "size": size}
    arrays = _arrays(mesh, sizes, ("prompts", "prompt_lengths", "prompt_ids"))
    lengths = arrays["prompt_lengths"]
    first, then = compiled(model, _STOP_IDS, mesh)

    start = functools.partial(prefill, model, mesh=mesh, **options)
    state, kept_prompts = jax.eval_shape(start, params, arrays["prompts"], lengths)
    kept = {"state": state, "prompts": kept_prompts}
    kept = _laid_out(kept, batch_shardings(mesh, kept, *size))
    key = _laid_out(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    lower_prefill = functools.partial(first.lower, params, arrays["prompts"], lengths, **options)
    lower_decode = functools.partial(
        then.lower,
        *(params, lengths, arrays["prompt_ids"], key, kept["prompts"]),
        state=kept["state"],
        sampling=config.rollout.params(),
    )
    return lower_prefill, lower_decode, kept, steps


def _arrays(mesh: Mesh, s: Sizes, names) -> dict[str, Any]:
    gk, gkt = (s.groups, s.k), (s.groups, s.k, s.t)
    shapes = {
        "prompts": ((s.groups, s.p), jnp.int32),
        "prompt_lengths": ((s.groups,), jnp.int32),
        "prompt_ids": ((s.groups,), jnp.uint32),
        "completions": (gkt, jnp.int32),
        "lengths": (gk, jnp.int32),
        "rewards": (gk, jnp.float32),
        "valid": (gk, jnp.bool_),
        "ref_logps": (gkt, jnp.float32),
        "old_logps": (gkt, jnp.float32),
        "source": (gk, jnp.int32),
        "version": (gk, jnp.int32),
    }
    tree = {name: jax.ShapeDtypeStruct(*shapes[name]) for name in names}
    return _laid_out(tree, batch_shardings(mesh, tree, s.groups, s.k))


def _laid_out(shapes: Any, layout: Any) -> Any:
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, layout)
