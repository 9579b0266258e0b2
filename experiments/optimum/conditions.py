"""What is compared: each condition is a loss and where the 8 completions of a group come from."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import language
from language import BETA, Problem, divergence
from training import DEMONSTRATIONS, Batch, K, Loss, Sources

from gvpo_jax import gvpo_loss
from gvpo_jax.baselines import dpo_loss, dr_grpo_loss, grpo_loss, rloo_loss

HUBER_DELTA = 0.25
WIDTH, WIDE = 0.5, 1.0  # of the reference's logits
# A group's mean holds a completion's own reward, which shrinks the expected gradient of R - mean by
# (k-1)/k. With the penalty shrunk alike, the objective is E[R] - beta KL, whose optimum is pi*.
KL_COEF = BETA * (K - 1) / K

Kind = Literal["samples", "variant", "support cut", "wide", "control"]


@dataclass(frozen=True)
class Condition:
    """One row of the table.

    own: KL between where its loss leads instead of pi*, as far as that is known, and the policy.
    """

    name: str
    kind: Kind
    sources: Sources
    loss: Loss
    own: Callable[[Problem, jax.Array], jax.Array] | None = None
    width: float = WIDTH


def gvpo(batch: Batch, **options: float) -> jax.Array:
    sums = batch.logps.sum(-1), batch.ref_logps.sum(-1)
    return gvpo_loss(*sums, batch.rewards, beta=BETA, **options)


def gvpo_not_stopped(batch: Batch) -> jax.Array:
    """The well-known slip: the weights take part in the gradient."""
    logps = batch.logps.sum(-1)
    residuals = batch.rewards - BETA * (logps - batch.ref_logps.sum(-1))
    weights = residuals - residuals.mean(-1, keepdims=True)
    return jnp.mean(-BETA * jnp.sum(weights * logps, -1) / (K - 1))


def rloo_kl_in_reward(batch: Batch) -> jax.Array:
    """RLOO on R - beta * log-ratio: GVPO's gradient by beta, where the policy itself samples."""
    paid = BETA * (batch.sampler_logps - batch.ref_logps).sum(-1)
    return rloo_loss(batch.logps, batch.sampler_logps, batch.rewards - paid, mask=batch.mask)


def policy_gradient(loss: Callable[..., jax.Array], *, kl_coef: float, ratio: bool = True) -> Loss:
    """ratio: to whatever sampled, clipped as published; without it samples pass for on-policy."""

    def of_batch(batch: Batch) -> jax.Array:
        old_logps = batch.sampler_logps if ratio else None
        arrays = batch.logps, old_logps, batch.rewards
        return loss(*arrays, mask=batch.mask, ref_logps=batch.ref_logps, kl_coef=kl_coef)

    return of_batch


def dpo(batch: Batch) -> jax.Array:
    return dpo_loss(batch.logps, batch.ref_logps, batch.rewards, mask=batch.mask, beta=BETA)


def dpo_with_noise(batch: Batch) -> jax.Array:
    """A Bradley-Terry judge: with Gumbel noise, P(i preferred to j) = sigmoid(R_i - R_j)."""
    noisy = batch.rewards + batch.gumbel
    return dpo_loss(batch.logps, batch.ref_logps, noisy, mask=batch.mask, beta=BETA)


def to_square_root(problem: Problem, logps: jax.Array) -> jax.Array:
    """KL(sqrt(pi*) / Z || policy): where the weights that are not stopped lead."""
    return divergence(jax.nn.log_softmax(language.optimum(problem) / 2), logps)


def to_k3_optimum(problem: Problem, logps: jax.Array) -> jax.Array:
    return divergence(language.k3_optimum(problem), logps)


def among_demonstrations(problem: Problem, logps: jax.Array) -> jax.Array:
    """KL(pi* || policy), both given that the text is one of the demonstrations."""
    seen = language.best_texts(problem.rewards, DEMONSTRATIONS)
    both = (jnp.take_along_axis(x, seen, -1) for x in (language.optimum(problem), logps))
    return divergence(*map(jax.nn.log_softmax, both))


ON_POLICY, OFFLINE, UNIFORM = (("policy", K),), (("reference", K),), (("uniform", K),)
MIXED = (("policy", K // 2), ("uniform", K // 2))
GVPO_SOURCES: dict[str, Sources] = {
    "on-policy": ON_POLICY,
    "offline, from the reference": OFFLINE,
    "uniform over the texts": UNIFORM,
    "4 on-policy + 4 uniform": MIXED,
    "4 on-policy + 4 replayed": (("policy", K // 2), ("replay", K // 2)),
    "samples of the policy 200 updates ago": (("stale", K),),
    "6 on-policy + 2 demonstrations": (("policy", K - 2), ("demonstrations", 2)),
    "sampled at temperature 1.5": (("hot", K),),
}
HUBER = functools.partial(gvpo, huber_delta=HUBER_DELTA)
REACHES = [
    *(Condition(name, "samples", sources, gvpo) for name, sources in GVPO_SOURCES.items()),
    Condition("on-policy, residuals clipped at 0.25", "variant", ON_POLICY, HUBER),
    Condition("offline, residuals clipped at 0.25", "variant", OFFLINE, HUBER),
    Condition("RLOO, KL in the reward, on-policy", "variant", ON_POLICY, rloo_kl_in_reward),
]
SUPPORT_CUT = [
    Condition(
        "demonstrations only", "support cut", (("demonstrations", K),), gvpo, among_demonstrations
    ),
    Condition("sampled with top-p 0.8", "support cut", (("top-p", K),), gvpo),
]
FEW = ("on-policy", "offline, from the reference", "4 on-policy + 4 uniform")
WIDE_REFERENCE = [
    Condition(f"{name}, wide reference", "wide", GVPO_SOURCES[name], gvpo, width=WIDE)
    for name in FEW
]
DR_GRPO_LOSS = functools.partial(dr_grpo_loss, max_completion_length=language.LONGEST)
GRPO, DR_GRPO = (
    policy_gradient(grpo_loss, kl_coef=KL_COEF),
    policy_gradient(DR_GRPO_LOSS, kl_coef=KL_COEF),
)
GRPO_AS_ON_POLICY = policy_gradient(grpo_loss, kl_coef=KL_COEF, ratio=False)
DR_GRPO_AS_ON_POLICY = policy_gradient(DR_GRPO_LOSS, kl_coef=KL_COEF, ratio=False)
CONTROLS = [
    Condition("GVPO, weights not stopped", "control", ON_POLICY, gvpo_not_stopped, to_square_root),
    Condition("GRPO without KL", "control", ON_POLICY, policy_gradient(grpo_loss, kl_coef=0.0)),
    Condition("GRPO + k3 KL", "control", ON_POLICY, GRPO),
    Condition("GRPO + k3 KL, uniform", "control", UNIFORM, GRPO),
    Condition("GRPO + k3 KL, uniform, no ratio", "control", UNIFORM, GRPO_AS_ON_POLICY),
    Condition("Dr. GRPO + k3 KL", "control", ON_POLICY, DR_GRPO, to_k3_optimum),
    Condition("Dr. GRPO + k3 KL, uniform", "control", UNIFORM, DR_GRPO),
    Condition("Dr. GRPO + k3 KL, uniform, no ratio", "control", UNIFORM, DR_GRPO_AS_ON_POLICY),
    Condition("DPO, better one always preferred, offline", "control", OFFLINE, dpo),
    Condition("DPO, Bradley-Terry judge, offline", "control", OFFLINE, dpo_with_noise),
]
SWEEP = {
    name: {
        kl_coef: Condition(name, "control", ON_POLICY, policy_gradient(loss, kl_coef=kl_coef))
        for kl_coef in (KL_COEF * 2.0**n for n in range(-3, 4))
    }
    for name, loss in (("GRPO", grpo_loss), ("Dr. GRPO", DR_GRPO_LOSS))
}
ALL = [*REACHES, *SUPPORT_CUT, *WIDE_REFERENCE, *CONTROLS]
SMALL = [
    *(condition for condition in REACHES if condition.name in FEW),
    *SUPPORT_CUT,
    *(condition for condition in CONTROLS if condition.own),
]
