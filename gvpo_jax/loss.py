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

**The last axis must hold whole groups.** Under `jit` it may be sharded: XLA adds up over devices.
Inside `shard_map` each device sees its own part only. A group that is cut there needs `axis_name`.
"""

from __future__ import annotations  # signatures show ArrayLike, not what it stands for

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from gvpo_jax.precision import float_type, valid

__all__ = [
    "group",
    "gvpo_loss",
    "gvpo_mse",
    "gvpo_weights",
    "ungroup",
]


def gvpo_weights(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    huber_delta: ArrayLike | None = None,
    k: int | None = None,
    axis_name: Hashable = None,
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
        k: how many completions a group has; checked. It finds flat `[G * k]` rows that `group` has
            not folded, and `[G, k, T]` log-probs of tokens that nobody has summed.
        axis_name: inside `shard_map`, the mesh axis over which groups are cut, or several. The last
            axis then holds this device's completions of each group.

    Returns:
        `[..., k]` float32 (float64 for float64 input); 0 at invalid completions and in groups with
        fewer than two valid ones.

    Raises:
        ValueError: shapes differ, k < 2 or not the k given, beta <= 0, or huber_delta <= 0.
    """
    residuals = _residuals(logps, ref_logps, rewards, beta, where, huber_delta, k, axis_name)[0]
    return jax.lax.stop_gradient(_huber_weights(residuals, where, huber_delta, axis_name))


def gvpo_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    huber_delta: ArrayLike | None = None,
    k: int | None = None,
    axis_name: Hashable = None,
) -> jax.Array:
    """The loss to differentiate: `-beta * sum_i w_i * l_i / (k-1)`, averaged over the groups.

    The weights w (see `gvpo_weights`) are constants. With `where`, k is the group's number of valid
    completions, and a group with fewer than two counts for nothing, also not in the average.
    The value itself wanders around 0 and says little: plot `gvpo_mse`.

    Arguments and errors are those of `gvpo_weights`. Gradients flow to `logps` alone.

    With `axis_name` every device has the whole groups' value, and `jax.grad`, inside `shard_map` or
    around it, gives each device the gradient of its own completions. Inside, that takes
    `shard_map`'s default `check_vma=True`. Average over other mesh axes yourself, as without it.

    Returns:
        A scalar, float32 (float64 for float64 input).
    """
    residuals, per_group, num_groups = _residuals(
        logps, ref_logps, rewards, beta, where, huber_delta, k, axis_name
    )
    weights = jax.lax.stop_gradient(_huber_weights(residuals, where, huber_delta, axis_name))
    beta, logps = (x.astype(weights.dtype) for x in (jnp.asarray(beta), valid(logps, where)))
    return -_over_devices(jnp.sum(beta * weights * logps * per_group), axis_name) / num_groups


def gvpo_mse(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    huber_delta: ArrayLike | None = None,
    k: int | None = None,
    axis_name: Hashable = None,
) -> jax.Array:
    """The same objective as a regression: `1/2 * sum_i w_i^2 / (k-1)`, averaged over the groups.

    With `huber_delta` it is `sum_i H(w_i) / (k-1)`. Its gradient equals that of `gvpo_loss`. Its
    value can be read: it starts near half the rewards' variance inside the groups and is 0 where
    beta * log-ratio explains every reward difference.

    Arguments and errors are those of `gvpo_weights`. Gradients flow to `logps` alone; with
    `axis_name` as for `gvpo_loss`.

    Returns:
        A scalar, float32 (float64 for float64 input).
    """
    ref_logps, rewards = jax.lax.stop_gradient((ref_logps, rewards))
    residuals, per_group, num_groups = _residuals(
        logps, ref_logps, rewards, beta, where, huber_delta, k, axis_name
    )
    total = jnp.sum(_huber(residuals, huber_delta) * per_group)
    return _over_devices(total, axis_name) / num_groups


def _residuals(logps, ref_logps, rewards, beta, where, huber_delta, k, axis_name):
    """Residuals [..., k], 1/(k-1) of each group [..., 1], and the number of groups that count."""
    _check_shapes(logps, ref_logps, rewards, where, k, axis_name)
    check_positive(beta=beta, huber_delta=huber_delta)
    logps, ref_logps, rewards = (valid(x, where) for x in (logps, ref_logps, rewards))
    dtype = float_type(logps, ref_logps, rewards)
    logps, ref_logps, rewards, beta = (
        x.astype(dtype) for x in (logps, ref_logps, rewards, jnp.asarray(beta))
    )
    count = _sum_of_group(_mask(rewards, where), axis_name)
    counts = count >= 2
    # Centring the difference centres both: mean(R) - beta * mean(rho) = mean(R - beta * rho).
    centred = _center(rewards - beta * (logps - ref_logps), where, axis_name)
    residuals = jnp.where(counts, centred, 0)
    per_group = jnp.where(counts, 1 / jnp.maximum(count - 1, 1), 0)
    return residuals, per_group, jnp.maximum(jnp.sum(counts.astype(dtype)), 1)


def _huber(residuals, delta):
    if delta is None:
        return 0.5 * residuals**2
    clipped = _clip(residuals, delta)
    return clipped * (residuals - 0.5 * clipped)


def _huber_weights(residuals, where, delta, axis_name):
    """Centred again, because every log-prob moves all residuals of its group through their mean."""
    if delta is None:
        return residuals
    return _center(_clip(residuals, delta), where, axis_name)


def _clip(residuals, delta):
    delta = jnp.asarray(delta).astype(residuals.dtype)
    return jnp.clip(residuals, -delta, delta)


def _center(x, where, axis_name):
    mask = _mask(x, where)
    count = jnp.maximum(_sum_of_group(mask, axis_name), 1)
    return (x - _sum_of_group(x * mask, axis_name) / count) * mask


def _sum_of_group(x, axis_name):
    return _over_devices(jnp.sum(x, axis=-1, keepdims=True), axis_name)


def _over_devices(x, axis_name):
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _mask(x, where):
    return jnp.ones_like(x) if where is None else jnp.asarray(where).astype(bool).astype(x.dtype)


def _check_shapes(logps, ref_logps, rewards, where, k, axis_name):
    arrays = {"logps": logps, "ref_logps": ref_logps, "rewards": rewards, "where": where}
    if none := [name for name, x in arrays.items() if x is None and name != "where"]:
        raise ValueError(f"{none[0]} is None: give an array [..., k], one number per completion")
    shape = jnp.shape(logps)
    for name, array in arrays.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(array)} but logps has shape {shape}; "
                "give every array as [..., k], one number per completion"
            )
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    check_groups("logps", shape, "rewards", jnp.shape(rewards), devices=devices)
    if k is not None and shape[-1] * devices != k:
        cut = f" on each of {devices} devices" if devices > 1 else ""
        raise ValueError(
            f"k={k}, but the last axis of logps, of shape {shape}, holds {shape[-1]}{cut}; fold "
            "flat rows [G * k] with gvpo_jax.group, sum [G, k, T] over its tokens, and name the "
            "mesh axis that cuts groups as axis_name"
        )


def check_groups(
    name: str, shape: tuple[int, ...], other: str, other_shape: tuple, *, devices: int = 1
) -> None:
    """Raises a ValueError where arrays of this shape have no groups of two completions or more."""
    if len(shape) == 0 or shape[-1] * devices < 2:
        raise ValueError(
            f"a group needs k >= 2 completions on the last axis, got {name} of shape {shape} and "
            f"{other} of shape {other_shape}"
        )


def check_positive(**numbers: ArrayLike | None) -> None:
    """Raises a ValueError for a number that is not; None and what is traced pass."""
    for name, number in numbers.items():
        known = number is not None and not isinstance(number, Tracer)
        if known and not np.all(np.asarray(number) > 0):
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


def __dir__() -> list[str]:
    """Tab completion offers what is for others to use."""
    return __all__
