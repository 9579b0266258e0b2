"""The compiled programs of a run, lowered from shapes alone: no weights, no live devices."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gvpo_jax.batch import Batch
from gvpo_jax.config import Config
from gvpo_jax.errors import UserError
from gvpo_jax.mesh import batch_axes, batch_shardings, make_mesh, replicated, shardings
from gvpo_jax.models.decoder import Apply, DecoderConfig, make_apply, param_shapes
from gvpo_jax.policy import _objective, _optimizer, _score, learning_rate_schedule
from gvpo_jax.rollout.inprocess import decode, prefill
from gvpo_jax.sampler import training_sampling
from gvpo_jax.train_step import TrainState, init_state, train_step

_STOP_IDS = (0, 1)  # which they are changes no size


@dataclass(frozen=True)
class Program:
    """One compiled function of a run.

    Attributes:
        name: what it does.
        lower: traces it for its mesh.
        beside: bytes on a device that it does not touch but that lie there meanwhile.
        loop: how often its main loop's body runs: micro-batches, or tokens; 1: there is none.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    beside: int
    loop: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch: g groups of k completions; prompts of p and completions of t tokens."""

    groups: int
    k: int
    p: int
    t: int


def mesh_on(config: Config, devices: Any) -> Mesh:
    """The mesh that the config lays over these devices."""
    m = config.mesh
    dcn = (m.dcn_data, m.dcn_fsdp, m.dcn_tensor)
    return make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor, dcn=dcn, devices=list(devices))


def batch_sizes(config: Config) -> dict[str, Sizes]:
    """The largest batch that each program is given: "train", "score" and "rollout"."""
    c = config
    longest = -(-c.data.max_prompt_length // 8) * 8  # as `pad_prompts` rounds
    t, k = c.rollout.max_completion_length, c.rollout.num_generations
    part = max(c.train.batch_size // c.train.micro_batches, 1)
    new = c.train.batch_size - c.replay.groups
    drawn = k - c.rollout.demonstrations - c.replay.completions
    return {
        "train": Sizes(c.train.batch_size, k, longest, t),
        "score": Sizes(part, k, longest, t),
        "rollout": Sizes(new, drawn, longest, t),
    }


def run_programs(config: Config, model: DecoderConfig, mesh: Mesh) -> list[Program]:
    """Update, scoring by the reference, prefill and decoding, as a `Policy` compiles them.

    Raises:
        UserError: a batch or a parameter does not divide over the mesh, or the lengths are more
            than the model was made for.
    """
    sizes = batch_sizes(config)
    _check(config, model, mesh, sizes)
    apply = make_apply(
        model, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat == "layer"
    )
    init = functools.partial(init_state, optimizer=_optimizer(config))
    state = _laid_out(shardings, mesh, jax.eval_shape(init, param_shapes(model)))
    params, all_state = device_bytes(state.params), device_bytes(state)
    snapshot = params if config.rollout.lookahead else 0
    constrain = functools.partial(_constrain, mesh)

    def lower_step():
        step = jax.jit(
            _step(config, apply),
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
            donate_argnums=0,
        )
        return step.lower(state, Batch(**_arrays(mesh, sizes["train"], Batch._fields)))

    def lower_score():
        names = ("prompts", "prompt_lengths", "completions")
        score = jax.jit(functools.partial(_score, apply, constrain))
        return score.lower(state.params, _arrays(mesh, sizes["score"], names))

    lower_prefill, lower_decode = _rollout(
        config, mesh, apply, constrain, state.params, sizes["rollout"]
    )
    # A fixed reference is another copy of the parameters, whatever its name.
    others = all_state - params + params + snapshot
    return [
        Program("train step", lower_step, params + snapshot, config.train.micro_batches),
        Program("reference scoring", lower_score, all_state + snapshot, 1),
        Program("rollout: prefill", lower_prefill, others, 1),
        Program("rollout: decode", lower_decode, others, config.rollout.max_completion_length),
    ]


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of laid out arrays, or of their shapes, on one device."""

    def of(x) -> int:
        count = 1
        for size in x.sharding.shard_shape(x.shape):
            count *= size
        return count * x.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def _check(config: Config, model: DecoderConfig, mesh: Mesh, sizes: dict[str, Sizes]) -> None:
    for key, name in (
        ("score", "train.batch_size / train.micro_batches"),
        ("rollout", "train.batch_size"),
    ):
        try:
            batch_axes(mesh, sizes[key].groups, sizes[key].k)
        except UserError as error:
            raise UserError(f"{name} = {sizes[key].groups}: {error}") from None
    total = config.data.max_prompt_length + config.rollout.max_completion_length
    if total > model.max_position_embeddings:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length = {total} tokens, but the "
            f"model was made for {model.max_position_embeddings}; lower one of them"
        )


def _step(config: Config, apply: Apply):
    optimizer, schedule = _optimizer(config), learning_rate_schedule(config)

    def step(state: TrainState, batch: Batch):
        new, metrics = train_step(
            state,
            batch,
            model=apply,
            optimizer=optimizer,
            objective=_objective(config),
            beta=config.loss.beta,
            micro_batches=config.train.micro_batches,
            completion_parts=config.train.completion_parts,
        )
        return new, metrics | {"learning_rate": jnp.asarray(schedule(state.step))}

    return step


def _rollout(config: Config, mesh: Mesh, apply: Apply, constrain, params, sizes: Sizes):
    arrays = _arrays(mesh, sizes, ("prompts", "prompt_lengths", "prompt_ids"))
    first = jax.jit(
        functools.partial(prefill, apply, constrain=constrain),
        static_argnames=("k", "max_completion_length"),
    )
    then = jax.jit(
        functools.partial(decode, apply, stop_ids=_STOP_IDS, constrain=constrain),
        static_argnames=("sampling",),
        donate_argnames=("state",),
    )

    def lower_prefill():
        prompts = arrays["prompts"], arrays["prompt_lengths"]
        return first.lower(params, *prompts, k=sizes.k, max_completion_length=sizes.t)

    def lower_decode():
        options = {"k": sizes.k, "max_completion_length": sizes.t, "constrain": lambda tree: tree}
        start = functools.partial(prefill, apply, **options)
        state, prefix = jax.eval_shape(start, params, arrays["prompts"], arrays["prompt_lengths"])
        tree = {"state": state, "prefix": prefix}
        tree = _with_shardings(tree, batch_shardings(mesh, tree, sizes.groups, sizes.k))
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
        return then.lower(
            params,
            arrays["prompt_lengths"],
            arrays["prompt_ids"],
            key,
            tree["prefix"],
            state=tree["state"],
            sampling=training_sampling(config),
        )

    return lower_prefill, lower_decode


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
    return _with_shardings(tree, batch_shardings(mesh, tree, s.groups, s.k))


def _laid_out(layout, mesh: Mesh, tree: Any) -> Any:
    return _with_shardings(tree, layout(mesh, tree))


def _with_shardings(tree: Any, layout: Any) -> Any:
    def put(x, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(put, tree, layout)


def _constrain(mesh: Mesh, tree: Any) -> Any:
    groups, k = (tree["state"].lengths_gk if "state" in tree else tree["logps"]).shape[:2]
    layout = batch_shardings(mesh, tree, groups, k)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, layout)
