"""One update of the policy: score the groups, weigh them, step. Pure functions; callers jit."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gvpo_jax.batch import Batch, split_groups
from gvpo_jax.logprobs import completion_mask, token_logprobs
from gvpo_jax.loss import gvpo_loss, gvpo_mse, gvpo_weights

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What an update changes. `step` counts updates, int32."""

    params: Any
    opt_state: Any
    step: jax.Array


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def score(model: Any, params: Any, prompts, prompt_lengths, completions) -> jax.Array:
    """Token log-probs of given completions, `[g, k, t]` float32 nats, meaningless past a length.

    The policy and the reference are scored by this same function, with different parameters.
    """
    hidden_gktd = model.completion_hidden(params, prompts, prompt_lengths, completions)
    return token_logprobs(hidden_gktd, model.head(params), completions)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Any,
    optimizer: optax.GradientTransformation,
    beta: float,
    micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One GVPO update on a batch of groups; its valid groups, counted once, normalise the loss.

    Args:
        state: parameters, optimizer state and step; donate it.
        batch: see `Batch`; its number of groups is a multiple of `micro_batches`.
        model: the model as functions, see `gvpo_jax.models.decoder.Apply`.
        optimizer: an Optax transformation.
        beta: see `gvpo_weights`.
        micro_batches: into how many parts of whole groups the backward pass is cut; the gradient
            does not depend on it.

    Returns:
        The new state, and scalar metrics of the policy before the update.

    Raises:
        ValueError: the groups do not divide into the micro-batches.
        AssertionError: the batch's arrays do not have the shapes that `Batch` says.
    """
    _check_shapes(batch)
    groups = batch.prompts.shape[0]
    if groups % micro_batches:
        raise ValueError(f"{groups} groups do not divide into {micro_batches} micro-batches")
    gradient = jax.grad(functools.partial(_loss, model, beta=beta), has_aux=True)
    num_groups = jnp.maximum(jnp.sum(jnp.sum(batch.valid, axis=-1) >= 2), 1)
    if micro_batches == 1:
        grads, logps = gradient(state.params, batch, num_groups)
    else:
        parts = split_groups(batch, micro_batches)
        grads, logps = _accumulate(gradient, state.params, parts, num_groups)
        batch = Batch(*(x.reshape(groups, *x.shape[2:]) for x in parts))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = _metrics(logps, batch, beta) | {"grad_norm": optax.tree.norm(grads)}
    return TrainState(params, opt_state, state.step + 1), metrics


def _check_shapes(batch: Batch) -> None:
    chex.assert_rank([batch.prompts, batch.completions, batch.rewards], [2, 3, 2])
    chex.assert_equal_shape([batch.lengths, batch.rewards, batch.valid])
    chex.assert_equal_shape([batch.completions, batch.ref_logps])
    chex.assert_equal_shape_prefix([batch.completions, batch.rewards], 2)
    chex.assert_equal_shape_prefix([batch.prompts, batch.prompt_lengths, batch.rewards], 1)


def _loss(model, params, batch: Batch, num_groups, *, beta):
    """This part's share of the batch's loss, and its token log-probs.

    Log-ratios are summed per token difference: the sums of log-probs themselves grow with the
    length, and their difference would carry their rounding.
    """
    logps_gkt = score(model, params, batch.prompts, batch.prompt_lengths, batch.completions)
    mask = completion_mask(batch.lengths, logps_gkt.shape[-1])
    log_ratio_gk = jnp.sum(jnp.where(mask, logps_gkt - batch.ref_logps, 0), axis=-1)
    zeros = jnp.zeros_like(log_ratio_gk)
    loss = gvpo_loss(log_ratio_gk, zeros, batch.rewards, beta=beta, where=batch.valid)
    here = jnp.maximum(jnp.sum(jnp.sum(batch.valid, axis=-1) >= 2), 1)
    return loss * here / num_groups, jax.lax.stop_gradient(logps_gkt)


def _accumulate(gradient, params, parts: Batch, num_groups):
    def add(total, part):
        grads, logps = gradient(params, part, num_groups)
        return jax.tree.map(jnp.add, total, grads), logps

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, logps = jax.lax.scan(add, zeros, parts)
    return grads, logps.reshape(-1, *logps.shape[2:])


def _metrics(logps_gkt, batch: Batch, beta) -> Metrics:
    """Scalars that say how the batch looks under the policy that produced the gradient.

    `kl` is the mean over tokens of exp(r) - r - 1 with r = ref - policy: non-negative, an unbiased
    estimate of KL(policy || reference) per token for samples of the policy.
    """
    mask = completion_mask(batch.lengths, logps_gkt.shape[-1]) & batch.valid[..., None]
    diff = jnp.where(mask, logps_gkt - batch.ref_logps, 0)
    log_ratio = jnp.sum(diff, axis=-1)
    zeros = jnp.zeros_like(log_ratio)
    residuals = gvpo_weights(log_ratio, zeros, batch.rewards, beta=beta, where=batch.valid)
    tokens = jnp.maximum(jnp.sum(mask), 1)
    completions = jnp.maximum(jnp.sum(batch.valid), 1)
    return {
        "loss": gvpo_loss(
            _sum(logps_gkt, mask),
            _sum(batch.ref_logps, mask),
            batch.rewards,
            beta=beta,
            where=batch.valid,
        ),
        "gvpo_mse": gvpo_mse(log_ratio, zeros, batch.rewards, beta=beta, where=batch.valid),
        "kl": jnp.sum(jnp.where(mask, jnp.exp(-diff) + diff - 1, 0)) / tokens,
        "log_ratio": jnp.sum(log_ratio) / completions,
        "weight_abs": jnp.sum(jnp.abs(residuals)) / completions,
        "entropy_sampled": -jnp.sum(jnp.where(mask, logps_gkt, 0)) / tokens,
    }


def _sum(token_logps, mask):
    return jnp.sum(jnp.where(mask, token_logps, 0), axis=-1)
