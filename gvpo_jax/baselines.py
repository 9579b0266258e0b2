"""The losses that GVPO is compared with: pure functions of token log-probs, nothing but jax.

Each comes twice. `grpo(...)` gives an `Objective`: a loss as a sum over groups and a count, which a
train step can take in parts; `grpo_loss(logps, old_logps, rewards, mask=...)` is their quotient.
All of them read

    logps, old_logps, ref_logps   [g, k, t]  token log-probs in nats: under the policy that learns,
                                  the policy that sampled, and a frozen reference
    rewards                       [g, k]     in any unit
    mask                          [g, k, t]  booleans, True at the completion's own tokens
    where                         [g, k]     booleans, True at valid completions (default: all)

and give a scalar in float32 (float64 for float64 input). What lies behind the mask, or in an
invalid completion, may be NaN: it reaches neither value nor gradient. A group with fewer than two
valid completions contributes nothing and isn't counted. Gradients flow to `logps` alone.
`old_logps=None` means on-policy: the samples are the learning policy's own.

With ratio r = exp(logp - old_logp) and advantage A, the policy gradient methods minimise

    -min(r * A, clip(r, 1 - epsilon, 1 + epsilon_high) * A) + kl_coef * k3

where `epsilon_high=None` means epsilon, `epsilon=math.inf` turns clipping off, and
k3 = exp(d) - d - 1 with d = ref_logp - logp estimates KL(policy || reference) per token (Schulman,
"Approximating KL Divergence"; GRPO, eq. 4). They differ in A, in whether r belongs to a token or to
the whole completion, and in what the sum is divided by. Defaults are the papers' or TRL 1.16's;
kl_coef is 0 everywhere, also where a paper has a penalty.
"""

from __future__ import annotations  # signatures show ArrayLike, not what it stands for

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gvpo_jax.loss import check_groups, check_positive
from gvpo_jax.precision import float_type, valid

__all__ = [
    "Objective",
    "dapo",
    "dapo_loss",
    "dpo",
    "dpo_loss",
    "dr_grpo",
    "dr_grpo_loss",
    "grpo",
    "grpo_loss",
    "gspo",
    "gspo_loss",
    "objective_loss",
    "rebel",
    "rebel_loss",
    "reinforce_pp",
    "reinforce_pp_loss",
    "rloo",
    "rloo_loss",
]

STD_OFFSET = 1e-4  # TRL's: added to a standard deviation before dividing by it
MAX_LOG_RATIO = 40.0  # keeps exp, and the square of its gradient, finite in float32


class Objective(NamedTuple):
    """A loss in a form that can be taken in parts: `total(batch) / count(batch)`.

    Compute `advantages` and `count` once, on the whole batch. `total` sums over groups, so the
    totals of parts of whole groups, divided by the whole batch's count, add up to its loss.

    Attributes:
        advantages: `(rewards, where) -> [g, k]`, without gradient, 0 at what doesn't count. For
            `rebel` and `dpo`, which compare rewards themselves, it is the rewards.
        total: `(logps, old_logps, ref_logps, advantages, mask, where) -> scalar`. `old_logps` may
            be None (on-policy), `ref_logps` where nothing is compared with a reference.
        count: `(advantages, mask, where) -> scalar`, at least 1.
    """

    advantages: Callable[..., jax.Array]
    total: Callable[..., jax.Array]
    count: Callable[..., jax.Array]


def grpo(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, kl_coef: float = 0.0
) -> Objective:
    """GRPO (arXiv 2402.03300, eq. 3): A = (R - mean) / std of the group; mean of token means.

    The outer mean is over completions: every valid one weighs the same, whatever its length. TRL:
    `loss_type="grpo"`. The std divides by k-1; the paper's kl_coef is 0.04.
    """
    total = _clipped_total(_per_token, _mean_over_tokens, epsilon, epsilon_high, kl_coef)
    return Objective(_standardised, total, _count_completions)


def dr_grpo(
    max_completion_length: int,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    kl_coef: float = 0.0,
) -> Objective:
    """Dr. GRPO (arXiv 2503.20783): A = R - mean, sum over tokens by a constant length.

    Neither the group's std nor the completion's own length divides. The constant is
    `max_completion_length` tokens, as in TRL's `loss_type="dr_grpo"`.
    """
    check_positive(max_completion_length=max_completion_length)
    total = _clipped_total(_per_token, _sum_over_tokens, epsilon, epsilon_high, kl_coef)

    def count(advantages_gk, mask_gkt, where_gk):
        return _count_completions(advantages_gk, mask_gkt, where_gk) * max_completion_length

    return Objective(_centred, total, count)


def dapo(
    *, epsilon: float = 0.2, epsilon_high: float | None = 0.28, kl_coef: float = 0.0
) -> Objective:
    """DAPO (arXiv 2503.14476, eq. 8): GRPO's A, a higher upper clip, mean over the batch's tokens.

    Only the loss: its dynamic sampling and overlong shaping are matters of data and rewards. TRL:
    `loss_type="dapo"` (its `"bnpo"` is the same on one batch).
    """
    total = _clipped_total(_per_token, _sum_over_tokens, epsilon, epsilon_high, kl_coef)
    return Objective(_standardised, total, _count_tokens)


def rloo(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, kl_coef: float = 0.0
) -> Objective:
    """RLOO (arXiv 2402.14740): A_i = R_i minus the others' mean; one ratio for a whole completion.

    r = exp(sum over tokens of logp - old_logp), clipped, averaged over completions, as TRL's
    RLOOTrainer does. On-policy its gradient is REINFORCE's, -mean of A_i * grad log pi(y_i), which
    times beta is that of `gvpo_loss` where the policy is the reference and all are valid. k3 is
    summed over tokens, like the ratio. Paper and TRL take a KL penalty (TRL: 0.05) off the rewards
    instead: for that, subtract `kl_coef * sum(old_logp - ref_logp)` from them.
    """
    total = _clipped_total(_per_completion, _sum_over_tokens, epsilon, epsilon_high, kl_coef)
    return Objective(_leave_one_out, total, _count_completions)


def gspo(
    *, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4, kl_coef: float = 0.0
) -> Objective:
    """GSPO (arXiv 2507.18071, eq. 5): GRPO's A; r = exp(mean over tokens of logp - old_logp).

    Clipped per completion, averaged over completions; the paper's clip range (section 5.1). TRL:
    `loss_type="grpo"` with `importance_sampling_level="sequence"`.
    """
    total = _clipped_total(_per_completion, _mean_over_tokens, epsilon, epsilon_high, kl_coef)
    return Objective(_standardised, total, _count_completions)


def reinforce_pp(
    *, epsilon: float = 0.2, epsilon_high: float | None = None, kl_coef: float = 0.0
) -> Objective:
    """REINFORCE++ with baseline (arXiv 2501.03262v9): R - group's mean, by the whole batch's std.

    The std (over n-1) is that of the batch's centred rewards, whose mean is 0 already. Clipped per
    token, mean over the batch's tokens. Not the paper's variant without a baseline, which is for
    single completions, nor its k2 penalty: kl_coef weighs k3 as everywhere here.
    """
    total = _clipped_total(_per_token, _sum_over_tokens, epsilon, epsilon_high, kl_coef)
    return Objective(functools.partial(_standardised, over=None), total, _count_tokens)


def rebel(eta: float) -> Objective:
    """REBEL (arXiv 2404.16767, algorithm 1), over all pairs of a group.

    `mean over pairs i < j of ((d_i - d_j) / eta - (R_i - R_j))^2`, averaged over groups, with
    d = sum over tokens of logp - old_logp; eta in nats per reward. The mean over pairs is twice the
    sample variance of d / eta - R: 4 * gvpo_mse with beta = 1/eta and the sampler as reference.
    """
    check_positive(eta=eta)

    def total(logps_gkt, old_logps_gkt, ref_logps_gkt, advantages_gk, mask_gkt, where_gk):
        rewards_gk, mask_gkt, where_gk = _prepare(logps_gkt, advantages_gk, mask_gkt, where_gk)
        log_ratio_gkt = _difference(logps_gkt, old_logps_gkt, mask_gkt)
        ratio_gk = _sum_over_tokens(log_ratio_gkt, mask_gkt)
        residual_gk = _centre(ratio_gk / eta - rewards_gk, where_gk)
        count_g1 = jnp.sum(where_gk, axis=-1, keepdims=True)
        return jnp.sum(2 * residual_gk**2 / jnp.maximum(count_g1 - 1, 1))

    return Objective(_as_they_are, total, count_groups)


def dpo(beta: float = 0.1) -> Objective:
    """DPO (arXiv 2305.18290, eq. 7) on every pair of a group whose rewards differ.

    `-log sigmoid(beta * (rho_i - rho_j))`, mean over the batch's pairs with R_i > R_j, with
    rho = sum over tokens of logp - ref_logp; beta without unit. `old_logps` is not used.
    """
    check_positive(beta=beta)

    def total(logps_gkt, old_logps_gkt, ref_logps_gkt, advantages_gk, mask_gkt, where_gk):
        _require(ref_logps_gkt, "dpo compares the policy with a reference: ref_logps")
        rewards_gk, mask_gkt, where_gk = _prepare(logps_gkt, advantages_gk, mask_gkt, where_gk)
        rho_gk = _sum_over_tokens(_difference(logps_gkt, ref_logps_gkt, mask_gkt), mask_gkt)
        margin_gkk = beta * (rho_gk[..., :, None] - rho_gk[..., None, :])
        preferred_gkk = _preferred(rewards_gk, where_gk)
        return jnp.sum(jnp.where(preferred_gkk, jax.nn.softplus(-margin_gkk), 0))

    def count(advantages_gk, mask_gkt, where_gk):
        return jnp.maximum(jnp.sum(_preferred(advantages_gk, _members(where_gk))), 1)

    return Objective(_as_they_are, total, count)


def objective_loss(
    objective: Objective,
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    ref_logps: ArrayLike | None,
    rewards: ArrayLike,
    *,
    mask: ArrayLike,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The objective's value on one batch: total / count. Shapes as at the top of this file.

    Raises:
        ValueError: shapes differ, k < 2, or log-probs that the objective needs are None.
    """
    where_gk = jnp.ones(jnp.shape(rewards), bool) if where is None else where
    with jax.numpy_dtype_promotion("standard"):  # the caller may forbid to mix dtypes
        advantages_gk = objective.advantages(rewards, where_gk)
        total = objective.total(logps, old_logps, ref_logps, advantages_gk, mask, where_gk)
        return total / objective.count(advantages_gk, mask, where_gk)


def dpo_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    mask: ArrayLike,
    where: ArrayLike | None = None,
    beta: float = 0.1,
) -> jax.Array:
    """The loss of `dpo(beta)`; arrays, result and errors as for `objective_loss`."""
    return objective_loss(dpo(beta), logps, None, ref_logps, rewards, mask=mask, where=where)


def _loss_of(make_objective: Callable[..., Objective]) -> Callable[..., jax.Array]:
    def loss(
        logps: ArrayLike,
        old_logps: ArrayLike | None,
        rewards: ArrayLike,
        *,
        mask: ArrayLike,
        where: ArrayLike | None = None,
        ref_logps: ArrayLike | None = None,
        **options,
    ) -> jax.Array:
        return objective_loss(
            make_objective(**options), logps, old_logps, ref_logps, rewards, mask=mask, where=where
        )

    name = make_objective.__name__
    loss.__name__ = loss.__qualname__ = f"{name}_loss"
    loss.__doc__ = f"The loss of `{name}(**options)`; see `objective_loss`."
    shown = inspect.signature(loss)
    options = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for option in inspect.signature(make_objective).parameters.values()
    ]
    given = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
    loss.__signature__ = shown.replace(parameters=[*given, *options])  # pyright: ignore
    return loss


grpo_loss = _loss_of(grpo)
dr_grpo_loss = _loss_of(dr_grpo)
dapo_loss = _loss_of(dapo)
rloo_loss = _loss_of(rloo)
gspo_loss = _loss_of(gspo)
reinforce_pp_loss = _loss_of(reinforce_pp)
rebel_loss = _loss_of(rebel)


def _clipped_total(ratio_of, reduce, epsilon, epsilon_high, kl_coef):
    """`total` of a policy gradient method.

    `reduce` takes tokens [g, k, t] to completions [g, k]; `ratio_of` says whether that happens to
    the log-ratios, before the clip, or to the clipped terms.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    numbers = {"epsilon": epsilon, "epsilon_high": epsilon_high, "kl_coef": kl_coef}
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must be >= 0, got {number}")
    surrogate = functools.partial(_surrogate, low=1 - epsilon, high=1 + epsilon_high)

    def total(logps_gkt, old_logps_gkt, ref_logps_gkt, advantages_gk, mask_gkt, where_gk):
        advantages_gk, mask_gkt, where_gk = _prepare(logps_gkt, advantages_gk, mask_gkt, where_gk)
        log_ratio_gkt = _difference(logps_gkt, old_logps_gkt, mask_gkt)
        loss_gk = ratio_of(surrogate, reduce, log_ratio_gkt, advantages_gk, mask_gkt)
        if kl_coef:
            _require(ref_logps_gkt, f"kl_coef {kl_coef} weighs a divergence from ref_logps")
            kl_gkt = _k3(_difference(logps_gkt, ref_logps_gkt, mask_gkt))
            loss_gk = loss_gk + kl_coef * reduce(kl_gkt, mask_gkt)
        return jnp.sum(jnp.where(where_gk, loss_gk, 0))

    return total


def _per_token(surrogate, reduce, log_ratio_gkt, advantages_gk, mask_gkt):
    return reduce(surrogate(log_ratio_gkt, advantages_gk[..., None]), mask_gkt)


def _per_completion(surrogate, reduce, log_ratio_gkt, advantages_gk, mask_gkt):
    return surrogate(reduce(log_ratio_gkt, mask_gkt), advantages_gk)


def _surrogate(log_ratio, advantages, *, low, high):
    # exp(x) = inf would turn the zero gradient of a clipped term into 0 * inf = NaN.
    ratio = jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)


def _k3(log_ratio):
    return jnp.expm1(jnp.minimum(-log_ratio, MAX_LOG_RATIO)) + log_ratio


def _sum_over_tokens(x_gkt, mask_gkt):
    return jnp.sum(jnp.where(mask_gkt, x_gkt, 0), axis=-1)


def _mean_over_tokens(x_gkt, mask_gkt):
    return _sum_over_tokens(x_gkt, mask_gkt) / jnp.maximum(jnp.sum(mask_gkt, axis=-1), 1)


def _difference(logps_gkt, others_gkt, mask_gkt):
    """Log-ratio per token, 0 where the mask is False; no gradient to the others (None: itself)."""
    others_gkt = logps_gkt if others_gkt is None else others_gkt
    if jnp.shape(others_gkt) != jnp.shape(logps_gkt):
        raise ValueError(
            f"log-probs of shape {jnp.shape(others_gkt)} compared with logps of shape "
            f"{jnp.shape(logps_gkt)}; give both as [g, k, t]"
        )
    logps_gkt, others_gkt = valid(logps_gkt, mask_gkt), valid(others_gkt, mask_gkt)
    dtype = float_type(logps_gkt, others_gkt)
    return logps_gkt.astype(dtype) - jax.lax.stop_gradient(others_gkt).astype(dtype)


def _as_they_are(rewards_gk, where_gk):
    return _rewards(rewards_gk, where_gk)[0]


def _centred(rewards_gk, where_gk):
    return _centre(*_rewards(rewards_gk, where_gk))


def _standardised(rewards_gk, where_gk, *, over: int | None = -1):
    """Centred rewards by their standard deviation over axis `over` (None: the whole batch)."""
    rewards_gk, members_gk = _rewards(rewards_gk, where_gk)
    centred_gk = _centre(rewards_gk, members_gk)
    freedom = jnp.maximum(jnp.sum(members_gk, axis=over, keepdims=True) - 1, 1)
    std = jnp.sqrt(jnp.sum(centred_gk**2, axis=over, keepdims=True) / freedom)
    return centred_gk / (std + STD_OFFSET)


def _leave_one_out(rewards_gk, where_gk):
    """R_i - mean of the others = (R_i - mean) * n / (n-1)."""
    rewards_gk, members_gk = _rewards(rewards_gk, where_gk)
    count_g1 = jnp.sum(members_gk, axis=-1, keepdims=True)
    return _centre(rewards_gk, members_gk) * count_g1 / jnp.maximum(count_g1 - 1, 1)


def _centre(x_gk, members_gk):
    count_g1 = jnp.maximum(jnp.sum(members_gk, axis=-1, keepdims=True), 1)
    mean_g1 = jnp.sum(jnp.where(members_gk, x_gk, 0), axis=-1, keepdims=True) / count_g1
    return jnp.where(members_gk, x_gk - mean_g1, 0)


def _rewards(rewards_gk, where_gk):
    """Rewards in float32 or wider, 0 at what doesn't count; and what counts."""
    _check_groups("rewards", jnp.shape(rewards_gk), "where", jnp.shape(where_gk))
    members_gk = _members(where_gk)
    rewards_gk = jax.lax.stop_gradient(valid(rewards_gk, members_gk))
    return rewards_gk.astype(float_type(rewards_gk)), members_gk


def _members(where_gk):
    """Valid completions in groups with at least two of them."""
    where_gk = jnp.asarray(where_gk).astype(bool)
    return where_gk & (jnp.sum(where_gk, axis=-1, keepdims=True) >= 2)


def _tokens(mask_gkt, where_gk):
    return jnp.asarray(mask_gkt).astype(bool) & _members(where_gk)[..., None]


def _preferred(rewards_gk, members_gk):
    """Pairs [g, k, k] of members whose first has the higher reward."""
    better_gkk = rewards_gk[..., :, None] > rewards_gk[..., None, :]
    return better_gkk & members_gk[..., :, None] & members_gk[..., None, :]


def _prepare(logps_gkt, advantages_gk, mask_gkt, where_gk):
    """Advantages without gradient, the tokens that count and the completions that count."""
    shape, mask = jnp.shape(logps_gkt), jnp.shape(mask_gkt)
    if len(shape) < 2 or mask != shape:
        raise ValueError(f"mask has shape {mask} but logps has shape {shape}; both are [g, k, t]")
    for name, array in {"rewards": advantages_gk, "where": where_gk}.items():
        _check_groups(name, jnp.shape(array), "logps without its tokens", shape[:-1])
    advantages_gk = jax.lax.stop_gradient(jnp.asarray(advantages_gk))
    return advantages_gk, _tokens(mask_gkt, where_gk), _members(where_gk)


def _count_tokens(advantages_gk, mask_gkt, where_gk):
    return jnp.maximum(jnp.sum(_tokens(mask_gkt, where_gk)), 1)


def _count_completions(advantages_gk, mask_gkt, where_gk):
    return jnp.maximum(jnp.sum(_members(where_gk)), 1)


def count_groups(advantages_gk, mask_gkt, where_gk):
    """Groups with at least two valid completions, at least 1; an `Objective.count`."""
    return jnp.maximum(jnp.sum(jnp.any(_members(where_gk), axis=-1)), 1)


def _check_groups(name, shape, other_name, other_shape):
    if shape != other_shape:
        raise ValueError(f"{name} has shape {shape} but {other_name} has shape {other_shape}")
    check_groups(name, shape, other_name, other_shape)


def _require(array, reason):
    if array is None:
        raise ValueError(f"{reason} must not be None")


def __dir__() -> list[str]:
    """Tab completion offers what is for others to use."""
    return __all__
