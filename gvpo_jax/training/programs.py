"""What a run compiles: the functions of its policy, for a config, a model's shape and a mesh."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvpo_jax.baselines import Objective
from gvpo_jax.config import Config
from gvpo_jax.data.batch import Batch
from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import (
    DecoderConfig,
    DecoderFns,
    DecoderOptions,
    decoder_fns,
    param_shapes,
)
from gvpo_jax.ops.cpu import chunk_bytes_on, product_on
from gvpo_jax.ops.kernels import attention_on
from gvpo_jax.parallel.mesh import (
    batch_shardings,
    check_hosts,
    constrain_activation,
    group_shards,
    make_mesh,
    replicated,
    shardings,
)
from gvpo_jax.training.objectives import make_objective
from gvpo_jax.training.optimizer import make_optimizer, make_schedule
from gvpo_jax.training.step import TrainState, init_state, token_logps, train_step


@dataclass(frozen=True)
class SamplingModel:
    """What sampling needs; it may cut the weights otherwise than training does.

    Attributes:
        mesh: the same devices.
        model: the decoder as functions, not jitted.
        params: `params -> params`, those to sample with; jitted, or the same ones.
    """

    mesh: Mesh
    model: DecoderFns
    params: Any


@dataclass(frozen=True)
class Programs:
    """Jitted functions over arrays that lie on the mesh; sampling's are in `rollout.inprocess`.

    Attributes:
        sampling: what `rollout.inprocess` samples with.
        init: `params -> TrainState`; takes the parameters over.
        step: `(state, batch, packed_size) -> (state, metrics)`, one update; takes the state over.
            It is compiled for each `packed_size`, see `step.token_logps`; default: None.
        token_logps: `(params, {"prompts", "prompt_lengths", "completions", "lengths"},
            packed_size) -> [g, k, t]` log-probs; without a size it needs no lengths.
        blend: `(average, params, decay) -> average`; takes the average over.
        reference: `params -> params`, a copy to score with. An average needs float32; any other is
            kept in the dtype of the computation, which gives the same numbers in less memory.
    """

    sampling: SamplingModel
    init: Callable[[Any], TrainState]
    step: Any
    token_logps: Any
    blend: Callable[[Any, Any, Any], Any]
    reference: Callable[[Any], Any]


def mesh_on(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the config lays over these devices; default: all that there are."""
    m = config.mesh
    dcn = (m.dcn_data, m.dcn_fsdp, m.dcn_tensor)
    return make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor, dcn=dcn, devices=devices)


def make_programs(config: Config, model: DecoderConfig, mesh: Mesh) -> Programs:
    """The functions of a run; nothing is compiled before it is called or lowered."""
    apply = _decoder_fns(config, model, mesh)
    optimizer, schedule, objective = _optimizer(config), _schedule(config), _objective(config)

    def init(params: Any) -> TrainState:
        return init_state(params, optimizer)

    def step(
        state: TrainState, batch: Batch, packed_size: int | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        new, metrics = train_step(
            state,
            batch,
            model=apply,
            optimizer=optimizer,
            objective=objective,
            beta=config.loss.beta,
            micro_batches=config.train.micro_batches,
            completion_parts=config.train.completion_parts,
            packed_size=packed_size,
        )
        return new, metrics | {"learning_rate": jnp.asarray(schedule(state.step))}

    layout = shardings(mesh, jax.eval_shape(init, param_shapes(model)))
    return Programs(
        sampling=_sampling_model(config, model, mesh, apply),
        init=jax.jit(init, out_shardings=layout, donate_argnums=0),
        step=jax.jit(
            step, out_shardings=(layout, replicated(mesh)), donate_argnums=0, static_argnums=2
        ),
        token_logps=jax.jit(functools.partial(_token_logps, apply, mesh), static_argnums=2),
        blend=jax.jit(_blend, donate_argnums=0),
        reference=jax.jit(functools.partial(_copy_in, _reference_dtype(config))),
    )


def _decoder_fns(config: Config, model: DecoderConfig, mesh: Mesh) -> DecoderFns:
    dtype, kept = jnp.dtype(config.model.dtype), config.rollout.cache_dtype
    options = DecoderOptions(
        dtype=dtype,
        remat=config.model.remat,
        cache_dtype=None if kept == "model" else jnp.dtype(kept),
        constrain=functools.partial(constrain_activation, mesh),
        params=lambda tree: jax.lax.with_sharding_constraint(tree, shardings(mesh, tree)),
        attention=attention_on(mesh, config.model.attention, dtype, model.head_dim),
        product=product_on(mesh),
        chunk_bytes=chunk_bytes_on(mesh),
        shards=group_shards(mesh),
    )
    return decoder_fns(model, options)


def _sampling_model(
    config: Config, model: DecoderConfig, mesh: Mesh, trained: DecoderFns
) -> SamplingModel:
    tensor = config.rollout.tensor
    if tensor is None:
        return SamplingModel(mesh, trained, lambda params: params)
    if mesh.size % tensor:
        raise UserError(f"rollout.tensor={tensor} does not divide {mesh.size} devices")
    # Neighbours along the last axes, in the same order: XLA takes no other beside the training's.
    grid = mesh.devices.reshape(mesh.size // tensor, 1, tensor)
    own = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    check_hosts(own, "rollout.tensor")
    layout = shardings(own, param_shapes(model))
    dtype = jnp.dtype(config.model.dtype)

    prepare = jax.jit(functools.partial(_copy_in, dtype), out_shardings=layout)
    return SamplingModel(own, _decoder_fns(config, model, own), prepare)


def constrain(mesh: Mesh, tree: Any) -> Any:
    """Lays out what decoding and scoring compute, while tracing."""
    groups, k = (tree["state"].item_sr if "state" in tree else tree["logps"]).shape[:2]
    layout = batch_shardings(mesh, tree, groups, k)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, layout)


def _token_logps(model, mesh, params, batch, packed_size=None):
    logps = token_logps(model, params, **batch, packed_size=packed_size)
    return constrain(mesh, {"logps": logps})["logps"]


def _blend(average, params, decay):
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def _copy_in(dtype, params):
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)


def _reference_dtype(c: Config) -> Any:
    return jnp.float32 if c.reference.name == "ema" else jnp.dtype(c.model.dtype)


def _optimizer(c: Config):
    o = c.optimizer
    return make_optimizer(
        o.name,
        _schedule(c),
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
    )


def _schedule(c: Config) -> Callable[[Any], Any]:
    return make_schedule(
        c.optimizer.schedule,
        learning_rate=c.optimizer.learning_rate,
        warmup_steps=c.optimizer.warmup_steps,
        total_steps=c.train.steps,
    )


def _objective(c: Config) -> Objective:
    return make_objective(
        c.loss.name,
        beta=c.loss.beta,
        huber_delta=c.loss.huber_delta,
        epsilon=c.loss.epsilon,
        epsilon_high=c.loss.epsilon_high,
        kl_coef=c.loss.kl_coef,
        max_completion_length=c.rollout.max_completion_length,
    )
