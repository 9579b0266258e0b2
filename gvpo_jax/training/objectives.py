"""The objective that a run's config names: GVPO, or one of those it is compared with."""

from typing import Any

import jax
import jax.numpy as jnp

from gvpo_jax import baselines
from gvpo_jax.baselines import Objective
from gvpo_jax.loss import gvpo_loss


def gvpo(*, beta: float, huber_delta: float | None = None) -> Objective:
    """GVPO as an objective over token log-probs: `gvpo_loss`, whose groups can be taken in parts.

    Log-ratios are summed per token difference: the sums of log-probs themselves grow with the
    length, and their difference would carry their rounding.
    """

    def total(logps_gkt, old_logps_gkt, ref_logps_gkt, rewards_gk, mask_gkt, where_gk):
        del old_logps_gkt  # whoever sampled: the optimum is the same

        def loss(logps_gk, ref_gk):
            return gvpo_loss(
                logps_gk, ref_gk, rewards_gk, beta=beta, where=where_gk, huber_delta=huber_delta
            )

        log_ratio_gk = _sum(logps_gkt - ref_logps_gkt, mask_gkt)
        value = loss(log_ratio_gk, jnp.zeros_like(log_ratio_gk))
        # The gradient is that of the log-ratios; the value shown is the paper's.
        shown = loss(_sum(logps_gkt, mask_gkt), _sum(ref_logps_gkt, mask_gkt))
        return (value + jax.lax.stop_gradient(shown - value)) * _groups(where_gk)

    return Objective(
        advantages=lambda rewards_gk, where_gk: rewards_gk,
        total=total,
        count=lambda rewards_gk, mask_gkt, where_gk: _groups(where_gk),
    )


def make_objective(
    name: str,
    *,
    beta: float,
    huber_delta: float | None,
    epsilon: float | None,
    epsilon_high: float | None,
    kl_coef: float,
    max_completion_length: int,
) -> Objective:
    """The objective of this name; a clipping range of None is the method's own default."""
    given = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    clip: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    clip["kl_coef"] = kl_coef
    match name:
        case "gvpo":
            return gvpo(beta=beta, huber_delta=huber_delta)
        case "grpo":
            return baselines.grpo(**clip)
        case "dr_grpo":
            return baselines.dr_grpo(max_completion_length, **clip)
        case "rloo":
            return baselines.rloo(**clip)
        case "dapo":
            return baselines.dapo(**clip)
        case "gspo":
            return baselines.gspo(**clip)
        case "reinforce_pp":
            return baselines.reinforce_pp(**clip)
        case "rebel":
            return baselines.rebel(1 / beta)
        case "dpo":
            return baselines.dpo(beta)
    raise ValueError(f"there is no objective {name!r}")


def _groups(where_gk):
    """Groups that count, at least 1."""
    return jnp.maximum(jnp.sum(jnp.sum(where_gk, axis=-1) >= 2), 1)


def _sum(token_logps, mask):
    return jnp.sum(jnp.where(mask, token_logps, 0), axis=-1)
