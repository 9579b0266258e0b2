"""The GVPO objective (arXiv 2504.19599): pure functions of `[..., k]` arrays, nothing but jax.

For the k completions y_i of one prompt x, with rewards R_i and log-ratios
rho_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), the paper weights each completion by

    w_i = (R_i - mean R) - beta * (rho_i - mean rho)

and minimises -beta * sum_i w_i log pi_theta(y_i|x) / (k-1) with w held constant. Its gradient is
that of half the residuals' sample variance, 1/2 * sum_i w_i^2 / (k-1), whose unique optimum is
pi* ~ pi_ref exp(R/beta).

With `huber_delta` the Huber function H takes the place of the half square: w^2/2 up to |w| = delta,
then delta * (|w| - delta/2). The gradient's weights become clip(w, -delta, delta), centred again;
one outlier moves a step less, and the optimum stays, because w = 0 there. Not in the paper.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike


def gvpo_weights(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    huber_delta: ArrayLike | None = None,
) -> jax.Array:
    """Weight of every completion: centred reward minus centred implicit reward; 0 at the optimum.

    `w_i = (R_i - mean R) - beta * ((l_i - ref_i) - mean(l - ref))`, arXiv 2504.19599, section 3.
    No gradient flows through the result.

    Args:
        logps: `[..., k]` log pi_theta(y_i|x) in nats, summed over the completion's tokens, end
            token included.
        ref_logps: `[..., k]` the same under the reference policy.
        rewards: `[..., k]` rewards in any unit; only their differences inside a group matter.
        beta: strength of the pull towards the reference, in units of reward per nat.
        where: `[..., k]` booleans, False at what is no valid completion (its numbers may be NaN).
        huber_delta: size, in units of reward, up to which a residual counts in full; None: any.

    Returns:
        `[..., k]` float32 (float64 for float64 input); 0 at invalid completions and in groups with
        fewer than two valid ones.

    Raises:
        ValueError: shapes differ, k < 2, beta <= 0, or huber_delta <= 0.
    """
    residuals = _residuals(logps, ref_logps, rewards, beta, where, huber_delta)[0]
    return jax.lax.stop_gradient(_huber_weights(residuals, where, huber_delta))


def gvpo_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    huber_delta: ArrayLike | None = None,
) -> jax.Array:
    """The loss to differentiate: `-beta * sum_i w_i * l_i / (k-1)`, averaged over the groups.

    The weights w (see `gvpo_weights`) are constants. With `where`, k is the group's number of valid
    completions, and a group with fewer than two counts for nothing, also not in the average.
    The value itself wanders around 0 and says little: plot `gvpo_mse`.

    Args: as for `gvpo_weights`. Gradients flow to `logps` alone.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes differ, k < 2, beta <= 0, or huber_delta <= 0.
    """
    residuals, per_group, num_groups = _residuals(
        logps, ref_logps, rewards, beta, where, huber_delta
    )
    weights = jax.lax.stop_gradient(_huber_weights(residuals, where, huber_delta))
    logps = _valid(logps, where).astype(weights.dtype)
    return -jnp.sum(beta * weights * logps * per_group) / num_groups


def gvpo_mse(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    huber_delta: ArrayLike | None = None,
) -> jax.Array:
    """The same objective as a regression: `1/2 * sum_i w_i^2 / (k-1)`, averaged over the groups.

    With `huber_delta` it is `sum_i H(w_i) / (k-1)`. Its gradient equals that of `gvpo_loss`. Its
    value can be read: it starts near half the rewards' variance inside the groups and is 0 where
    beta * log-ratio explains every reward difference.

    Args: as for `gvpo_weights`. Gradients flow to `logps` alone.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes differ, k < 2, beta <= 0, or huber_delta <= 0.
    """
    ref_logps, rewards = jax.lax.stop_gradient((ref_logps, rewards))
    residuals, per_group, num_groups = _residuals(
        logps, ref_logps, rewards, beta, where, huber_delta
    )
    return jnp.sum(_huber(residuals, huber_delta) * per_group) / num_groups


def _residuals(logps, ref_logps, rewards, beta, where, huber_delta):
    """Residuals [..., k], 1/(k-1) of each group [..., 1], and the number of groups that count."""
    logps, ref_logps, rewards = (jnp.asarray(x) for x in (logps, ref_logps, rewards))
    _check_shapes(logps, ref_logps, rewards, where)
    _check_positive(beta=beta, huber_delta=huber_delta)
    dtype = jnp.result_type(logps, ref_logps, rewards, jnp.float32)
    logps, ref_logps, rewards = (
        _valid(x, where).astype(dtype) for x in (logps, ref_logps, rewards)
    )
    count = jnp.sum(_mask(rewards, where), axis=-1, keepdims=True)
    counts = count >= 2
    # Centring the difference centres both: mean(R) - beta * mean(rho) = mean(R - beta * rho).
    residuals = jnp.where(counts, _center(rewards - beta * (logps - ref_logps), where), 0)
    per_group = jnp.where(counts, 1 / jnp.maximum(count - 1, 1), 0)
    return residuals, per_group, jnp.maximum(jnp.sum(counts.astype(dtype)), 1)


def _huber(residuals, delta):
    if delta is None:
        return 0.5 * residuals**2
    clipped = jnp.clip(residuals, -delta, delta)
    return clipped * (residuals - 0.5 * clipped)


def _huber_weights(residuals, where, delta):
    """Centred again, because every log-prob moves all residuals of its group through their mean."""
    if delta is None:
        return residuals
    return _center(jnp.clip(residuals, -delta, delta), where)


def _center(x, where):
    mask = _mask(x, where)
    count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    return (x - jnp.sum(x * mask, axis=-1, keepdims=True) / count) * mask


def _mask(x, where):
    return jnp.ones_like(x) if where is None else jnp.asarray(where).astype(bool).astype(x.dtype)


def _valid(x, where):
    """Zeros in place of what does not count: a NaN there reaches neither value nor gradient."""
    return jnp.asarray(x) if where is None else jnp.where(jnp.asarray(where).astype(bool), x, 0)


def _check_shapes(logps, ref_logps, rewards, where):
    arrays = {"logps": logps, "ref_logps": ref_logps, "rewards": rewards}
    if where is not None:
        arrays["where"] = jnp.asarray(where)
    for name, array in arrays.items():
        if array.shape != logps.shape:
            raise ValueError(
                f"{name} has shape {array.shape} but logps has shape {logps.shape}; "
                "give every array as [..., k], one number per completion"
            )
    if logps.ndim == 0 or logps.shape[-1] < 2:
        raise ValueError(
            f"a group needs k >= 2 completions on the last axis, got logps of shape {logps.shape} "
            f"and rewards of shape {rewards.shape}"
        )


def _check_positive(**numbers):
    for name, number in numbers.items():
        if number is None or isinstance(number, Tracer):
            continue
        if not np.all(np.asarray(number) > 0):
            raise ValueError(f"{name} must be > 0, got {number}")


def group(x: jax.Array, k: int) -> jax.Array:
    """Fold flat rows into groups: `[G*k, ...] -> [G, k, ...]`; a prompt's rows are neighbours.

    Raises:
        ValueError: k < 1, or the number of rows is not a multiple of k.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if x.ndim == 0 or x.shape[0] % k:
        raise ValueError(f"rows of shape {x.shape} do not divide into groups of k={k}")
    return x.reshape(x.shape[0] // k, k, *x.shape[1:])


def ungroup(x: jax.Array) -> jax.Array:
    """Unfold groups into flat rows: `[G, k, ...] -> [G*k, ...]`, the inverse of `group`.

    Raises:
        ValueError: x has fewer than two axes.
    """
    if x.ndim < 2:
        raise ValueError(f"expected [G, k, ...], got shape {x.shape}")
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
