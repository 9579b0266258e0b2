"""Optax optimizers and schedules from plain settings."""

from typing import Literal

import jax
import optax

OptimizerName = Literal["adamw", "adafactor", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]


def make_schedule(
    name: ScheduleName, *, learning_rate: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Learning rate over updates: linear warm-up, then constant, or decay to 0 at the end."""
    after = max(total_steps - warmup_steps, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, after),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after),
    }[name]()
    if warmup_steps == 0:
        return decay
    # The first update already moves: the ramp is at the full rate on update number `warmup_steps`.
    ramp = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([ramp, decay], [warmup_steps])


def make_optimizer(
    name: OptimizerName,
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Clipping of the gradient's global norm, then the optimizer; decay spares norms and biases."""
    optimizer = {
        "adamw": lambda: optax.adamw(
            schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_matrices
        ),
        # Optax's own adafactor decays by the same rate at every update, whatever the schedule says.
        "adafactor": lambda: optax.chain(
            optax.adafactor(multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-weight_decay, _matrices),
            optax.scale_by_schedule(schedule),
        ),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(weight_decay, _matrices),
            optax.sgd(schedule, momentum=b1 or None),
        ),
    }[name]()
    if max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def _matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)
