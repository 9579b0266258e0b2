"""The objective that a run's config names: GVPO, one of those it is compared with, or SFT's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gvpo_jax import baselines
from gvpo_jax.baselines import Objective
from gvpo_jax.loss import gvpo_loss
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class LossConfig:
    """What an update minimises."""

    name: Literal[
        "gvpo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "reinforce_pp", "rebel", "dpo", "sft"
    ] = setting(
        "gvpo",
        "GVPO, or a method that it is compared with, see gvpo_jax.baselines. sft: the rows' texts "
        "are learnt, nothing is sampled.",
    )
    beta: float = setting(
        0.1,
        "Pull towards the reference, in reward per nat. rebel: 1/eta.",
        above=0,
        hint="the paper uses 0.01 to 0.5",
    )
    huber_delta: float | None = setting(
        None,
        "gvpo: residuals are clipped here, in units of reward.",
        above=0,
        hint="null: no clipping",
    )
    epsilon: float | None = setting(
        None, "The baselines' clipping of probability ratios; null: as published.", least=0
    )
    epsilon_high: float | None = setting(None, "Its upper side; null: as published.", least=0)
    kl_coef: float = setting(0.0, "The baselines' KL penalty.", least=0)
    router_aux_coef: float = setting(
        0.0,
        "Of the load balancing loss of a mixture of experts (transformers' router_aux_loss_coef), "
        "which is added to any objective and changes its optimum.",
        least=0,
        hint="transformers' default for Qwen3-MoE is 0.001",
    )

    def told(
        self, of_update: Mapping[str, Any], of_batch: Mapping[str, float]
    ) -> tuple[Mapping[str, Any], Mapping[str, float]]:
        """An update's metrics, and its batch's, without those that say nothing of this loss."""
        if self.name != "sft":
            return of_update, of_batch
        both = (of_update, of_batch)
        update, batch = ({n: x for n, x in ms.items() if not _of_groups(n)} for ms in both)
        return update, batch

    def objective(self, max_completion_length: int) -> Objective:
        """The objective of this name; dr_grpo divides by `max_completion_length`."""
        if self.name == "gvpo":
            return gvpo(beta=self.beta, huber_delta=self.huber_delta)
        if self.name == "sft":
            return sft()
        if self.name == "rebel":
            return baselines.rebel(1 / self.beta)
        if self.name == "dpo":
            return baselines.dpo(self.beta)
        method = getattr(baselines, self.name, None)
        if method is None:
            raise ValueError(f"there is no objective {self.name!r}")
        options = {name: getattr(self, name) for name in ("epsilon", "epsilon_high", "kl_coef")}
        if self.name == "dr_grpo":
            options["max_completion_length"] = max_completion_length
        return method(**{name: value for name, value in options.items() if value is not None})


def _of_groups(name: str) -> bool:
    whose = ("reward", "gvpo_mse", "weight_abs", "source/", "skipped_groups", "kl", "log_ratio")
    return name.startswith(whose)


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
        groups = baselines.count_groups(rewards_gk, mask_gkt, where_gk)
        return (value + jax.lax.stop_gradient(shown - value)) * groups

    return Objective(lambda rewards_gk, where_gk: rewards_gk, total, baselines.count_groups)


def sft() -> Objective:
    """Cross-entropy of the completions: minus the mean of their tokens' log-probs, in nats.

    The mean is over all tokens of the batch. Rewards and references do not matter, and a group may
    be a single completion.
    """

    def total(logps_gkt, old_logps_gkt, ref_logps_gkt, rewards_gk, mask_gkt, where_gk):
        return -jnp.sum(_sum(logps_gkt, mask_gkt & where_gk[..., None]))

    def count(rewards_gk, mask_gkt, where_gk):
        return jnp.maximum(jnp.sum(mask_gkt & where_gk[..., None]), 1)

    return Objective(lambda rewards_gk, where_gk: rewards_gk, total, count)


def _sum(token_logps, mask):
    return jnp.sum(jnp.where(mask, token_logps, 0), axis=-1)
