"""What a run compiles to train: update, log-probs and the reference's copies, on a mesh."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gvpo_jax.models.decoder import DecoderFns
from gvpo_jax.models.lora import join
from gvpo_jax.parallel.layout import constrain_batch, path_name, replicated, shardings
from gvpo_jax.rollout.make import copy_in
from gvpo_jax.training.objectives import LossConfig
from gvpo_jax.training.optimizer import OptimizerConfig
from gvpo_jax.training.step import TrainState, init_state, stacked, token_logps, train_step


@dataclass(frozen=True)
class Programs:
    """Jitted functions over arrays that lie on the mesh; sampling's are in `rollout.inprocess`.

    Attributes:
        mesh: where they run.
        dtype: name of the dtype of the computation.
        init: `params -> TrainState`; takes the parameters over.
        step: `(state, batch, frozen=, packed_size=) -> (state, metrics)`, one update; takes the
            state over. `frozen` are the parameters beside those that are trained; default: none.
            It is compiled for each `packed_size`, see `step.token_logps`; default: None.
        token_logps: `(params, {"prompts", "prompt_lengths", "completions", "lengths"},
            packed_size, frozen=) -> [g, k, t]` log-probs; without a size it needs no lengths.
        blend: `(params, average, share) -> average` with so much of the params; takes it over.
        reference: `params -> params`, a copy to score with. An average needs float32; any other is
            kept in the dtype of the computation, which gives the same numbers in less memory.
    """

    mesh: Mesh
    dtype: str
    init: Callable[[Any], TrainState]
    step: Any
    token_logps: Any
    blend: Callable[[Any, Any, Any], Any]
    reference: Callable[[Any], Any]


@functools.lru_cache(maxsize=8)  # a second trainer of the same settings compiles nothing again
def make_programs(
    model: DecoderFns,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    tree: Any,
    mesh: Mesh,
    *,
    dtype: str,
    optimizer: OptimizerConfig | optax.GradientTransformation,
    updates: int,
    loss: LossConfig,
    max_completion_length: int,
    micro_batches: int,
    completion_parts: int,
    averaged: bool,
) -> Programs:
    """The functions of a run; nothing is compiled before it is called or lowered.

    Args:
        model: what is trained.
        shapes: of the parameters that are trained.
        tree: their structure.
        mesh: where they lie.
        dtype: of the computation.
        optimizer: see its section, as for `loss`; or one of the user's own.
        updates: how many there will be, by which the learning rate is scheduled.
        loss: what an update minimises.
        max_completion_length: in tokens.
        micro_batches: see `train_step`.
        completion_parts: see `train_step`.
        averaged: whether the reference is an average of policies.
    """
    rates = None
    if isinstance(optimizer, OptimizerConfig):
        transformation, rates = optimizer.create(updates), optimizer.rates(updates)
    else:
        transformation = optimizer
    init = functools.partial(init_state, optimizer=transformation)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=transformation,
        objective=loss.objective(max_completion_length),
        beta=loss.beta,
        router_aux_coef=loss.router_aux_coef,
        rates=rates,
        micro_batches=micro_batches,
        completion_parts=completion_parts,
    )
    step.__name__ = "train_step"  # pyright: ignore[reportAttributeAccessIssue]  # for profiles
    layout = shardings(mesh, jax.eval_shape(init, jax.tree.unflatten(tree, shapes)))
    reference_dtype = jnp.dtype("float32" if averaged else dtype)
    return Programs(
        mesh=mesh,
        dtype=dtype,
        init=jax.jit(init, out_shardings=layout, donate_argnums=0),
        step=jax.jit(
            step,
            out_shardings=(layout, replicated(mesh)),
            donate_argnums=0,
            static_argnames=("packed_size",),
        ),
        token_logps=jax.jit(functools.partial(_token_logps, model, mesh), static_argnums=2),
        blend=jax.jit(optax.incremental_update, donate_argnums=1),
        reference=jax.jit(functools.partial(_reference, reference_dtype, model.in_float32)),
    )


def _reference(dtype, in_float32, params):
    def kept(path, x, copied):
        return jnp.copy(x) if path_name(path).rpartition("/")[2] in in_float32 else copied

    return jax.tree.map_with_path(kept, params, copy_in(dtype, params))


def _token_logps(model, mesh, params, batch, packed_size=None, frozen=None):
    whole = join(stacked(model, frozen), stacked(model, params))
    logps = token_logps(model, whole, **batch, packed_size=packed_size)
    return constrain_batch(mesh, {"logps": logps}, *logps.shape[:2])["logps"]
