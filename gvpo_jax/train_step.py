"""One update of the policy: score the groups, weigh them, step. Pure functions; callers jit."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gvpo_jax.baselines import Objective
from gvpo_jax.batch import Batch, split_groups
from gvpo_jax.logprobs import completion_mask, token_logprobs
from gvpo_jax.loss import gvpo_mse, gvpo_weights
from gvpo_jax.samples import UNKNOWN, Source

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
    objective: Objective,
    beta: float,
    micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update on a batch of groups; what the loss is divided by is counted once, over them all.

    Args:
        state: parameters, optimizer state and step; donate it.
        batch: see `Batch`; its number of groups is a multiple of `micro_batches`.
        model: the model as functions, see `gvpo_jax.models.decoder.Apply`.
        optimizer: an Optax transformation.
        objective: what to minimise, e.g. `gvpo_jax.objectives.gvpo(beta=0.1)`.
        beta: of the metrics `gvpo_mse` and `weight_abs`, see `gvpo_weights`.
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
    gradient = jax.grad(functools.partial(_share, model, objective), has_aux=True)
    advantages_gk = objective.advantages(batch.rewards, batch.valid)
    count = objective.count(advantages_gk, _mask(batch), batch.valid)
    if micro_batches == 1:
        grads, logps = gradient(state.params, batch, advantages_gk, count)
    else:
        parts = split_groups((batch, advantages_gk), micro_batches)
        grads, logps = _accumulate(gradient, state.params, parts, count)
        batch, advantages_gk = jax.tree.map(lambda x: x.reshape(groups, *x.shape[2:]), parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    loss = _total(objective, logps, batch, advantages_gk) / count
    metrics = _metrics(logps, batch, beta) | _by_source(logps, batch, beta, state.step)
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(params, opt_state, state.step + 1), metrics


def _check_shapes(batch: Batch) -> None:
    chex.assert_rank([batch.prompts, batch.completions, batch.rewards], [2, 3, 2])
    chex.assert_equal_shape(
        [batch.lengths, batch.rewards, batch.valid, batch.source, batch.version]
    )
    chex.assert_equal_shape([batch.completions, batch.ref_logps, batch.old_logps])
    chex.assert_equal_shape_prefix([batch.completions, batch.rewards], 2)
    chex.assert_equal_shape_prefix([batch.prompts, batch.prompt_lengths, batch.rewards], 1)


def _share(model, objective, params, batch: Batch, advantages_gk, count):
    """This part's share of the batch's loss, and its token log-probs."""
    logps_gkt = score(model, params, batch.prompts, batch.prompt_lengths, batch.completions)
    total = _total(objective, logps_gkt, batch, advantages_gk)
    return total / count, jax.lax.stop_gradient(logps_gkt)


def _total(objective, logps_gkt, batch: Batch, advantages_gk):
    here = jax.lax.stop_gradient(logps_gkt)
    old_gkt = jnp.where(jnp.isnan(batch.old_logps), here, batch.old_logps)
    return objective.total(
        logps_gkt, old_gkt, batch.ref_logps, advantages_gk, _mask(batch), batch.valid
    )


def _accumulate(gradient, params, parts, count):
    def add(total, part):
        grads, logps = gradient(params, *part, count)
        return jax.tree.map(jnp.add, total, grads), logps

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, logps = jax.lax.scan(add, zeros, parts)
    return grads, logps.reshape(-1, *logps.shape[2:])


def _metrics(logps_gkt, batch: Batch, beta) -> Metrics:
    """Scalars that say how the batch looks under the policy that produced the gradient.

    `kl` is the mean over tokens of exp(r) - r - 1 with r = ref - policy: non-negative, an unbiased
    estimate of KL(policy || reference) per token for samples of the policy.
    """
    mask = _mask(batch)
    diff = jnp.where(mask, logps_gkt - batch.ref_logps, 0)
    log_ratio = jnp.sum(diff, axis=-1)
    zeros = jnp.zeros_like(log_ratio)
    tokens = jnp.maximum(jnp.sum(mask), 1)
    completions = jnp.maximum(jnp.sum(batch.valid), 1)
    return {
        "gvpo_mse": gvpo_mse(log_ratio, zeros, batch.rewards, beta=beta, where=batch.valid),
        "kl": jnp.sum(jnp.where(mask, jnp.exp(-diff) + diff - 1, 0)) / tokens,
        "log_ratio": jnp.sum(log_ratio) / completions,
        "weight_abs": jnp.sum(jnp.abs(_weights(diff, batch, beta))) / completions,
        "entropy_sampled": -jnp.sum(jnp.where(mask, logps_gkt, 0)) / tokens,
    }


def _by_source(logps_gkt, batch: Batch, beta, step) -> Metrics:
    """Share of the completions, mean residual and mean age in updates, by where they came from."""
    weights = _weights(jnp.where(_mask(batch), logps_gkt - batch.ref_logps, 0), batch, beta)
    completions = jnp.maximum(jnp.sum(batch.valid), 1)
    metrics = {}
    for source in Source:
        of_source = batch.valid & (batch.source == source)
        dated = of_source & (batch.version != UNKNOWN)
        age = jnp.where(dated, step - batch.version, 0)
        name = f"source/{source.name.lower()}"
        count = jnp.sum(of_source)
        metrics[f"{name}/share"] = count / completions
        metrics[f"{name}/residual"] = jnp.sum(jnp.where(of_source, weights, 0)) / jnp.maximum(
            count, 1
        )
        metrics[f"{name}/staleness"] = jnp.sum(age) / jnp.maximum(jnp.sum(dated), 1)
    return metrics


def _weights(diff_gkt, batch: Batch, beta):
    log_ratio = jnp.sum(diff_gkt, axis=-1)
    zeros = jnp.zeros_like(log_ratio)
    return gvpo_weights(log_ratio, zeros, batch.rewards, beta=beta, where=batch.valid)


def _mask(batch: Batch):
    """Tokens that belong to a valid completion, `[g, k, t]`."""
    return completion_mask(batch.lengths, batch.completions.shape[-1]) & batch.valid[..., None]
