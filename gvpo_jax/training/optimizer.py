"""Optax optimizers and schedules from the config section `optimizer`."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax

from gvpo_jax.settings import setting


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "adafactor", "sgd"] = setting("adamw", "The optimizer.")
    learning_rate: float = setting(1e-6, "The highest learning rate of the run.", least=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "Of the learning rate after the warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = setting(0, "Updates in which the rate rises from 0.", least=0)
    b1: float = setting(0.9, "Decay of the first moment; sgd's momentum.", least=0, below=1)
    b2: float = setting(0.95, "Decay of the second moment.", least=0, below=1)
    eps: float = setting(1e-8, "Added to the root of the second moment.", least=0)
    weight_decay: float = setting(0.0, "Spares norms and biases.", least=0)
    max_grad_norm: float | None = setting(
        1.0, "The gradient is clipped to this norm.", above=0, hint="null switches clipping off"
    )

    def rates(self, total_steps: int) -> optax.Schedule:
        """Learning rate over updates: linear warm-up, then constant, or decay to 0 at the end."""
        peak, after = self.learning_rate, max(total_steps - self.warmup_steps, 1)
        decay = {
            "constant": lambda: optax.constant_schedule(peak),
            "linear": lambda: optax.linear_schedule(peak, 0.0, after),
            "cosine": lambda: optax.cosine_decay_schedule(peak, after),
        }[self.schedule]()
        if self.warmup_steps == 0:
            return decay
        # The first update already moves: the last one of the ramp is at the full rate.
        first = peak / self.warmup_steps
        ramp = optax.linear_schedule(first, peak, self.warmup_steps - 1)
        return optax.join_schedules([ramp, decay], [self.warmup_steps])

    def create(self, total_steps: int) -> optax.GradientTransformation:
        """Clipping of the gradient's global norm, then the optimizer."""
        rates, decay = self.rates(total_steps), self.weight_decay
        optimizer = {
            "adamw": lambda: optax.adamw(
                rates, self.b1, self.b2, self.eps, weight_decay=decay, mask=_matrices
            ),
            # Optax's own adafactor decays by the same rate at every update, whatever the schedule.
            "adafactor": lambda: optax.chain(
                optax.adafactor(multiply_by_parameter_scale=False),
                optax.add_decayed_weights(-decay, _matrices),
                optax.scale_by_schedule(rates),
            ),
            "sgd": lambda: optax.chain(
                optax.add_decayed_weights(decay, _matrices),
                optax.sgd(rates, momentum=self.b1 or None),
            ),
        }[self.name]()
        if self.max_grad_norm is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optimizer)


def _matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)
