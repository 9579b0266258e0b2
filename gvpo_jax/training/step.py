"""One update of the policy: score the groups, weigh them, step. Pure functions; callers jit."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gvpo_jax.baselines import Objective
from gvpo_jax.data.batch import (
    Batch,
    fill_up,
    join_completions,
    join_groups,
    split_completions,
    split_groups,
)
from gvpo_jax.data.groups import UNKNOWN, Source
from gvpo_jax.logprobs import CHUNK_BYTES, completion_mask, token_logprobs
from gvpo_jax.loss import gvpo_mse, gvpo_weights
from gvpo_jax.ops.packing import pack_tokens

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What an update changes. `step` counts updates, int32."""

    params: Any
    opt_state: Any
    step: jax.Array


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def token_logps(
    model: Any,
    params: Any,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    completions: jax.Array,
    lengths: jax.Array | None = None,
    *,
    packed_size: int | None = None,
) -> jax.Array:
    """Token log-probs of given completions, `[g, k, t]` float32 nats, meaningless past a length.

    The policy and the reference are scored by this same function, with different parameters.

    Args:
        model: see `gvpo_jax.models.decoder.DecoderFns`.
        params: its parameters.
        prompts: `[g, p]`, with their lengths `[g]`.
        completions: `[g, k, t]`, with their lengths `[g, k]`, which only packing needs.
        packed_size: tokens to compute in each of the `model.shards` parts of the batch, see
            `gvpo_jax.data.packing_plan.make_plan`; all is NaN where they are too few. None, or for
            a model without `packed_hidden`: all tokens, padding too.
    """
    head_vd = model.head(params)
    logprobs = functools.partial(
        token_logprobs,
        chunk_bytes=model.chunk_bytes * model.shards,
        kept_bytes=CHUNK_BYTES * model.shards,
    )
    if packed_size is None or model.packed_hidden is None:
        hidden_gktd = model.completion_hidden(params, prompts, prompt_lengths, completions)
        return logprobs(hidden_gktd, head_vd, completions)
    if lengths is None:
        raise ValueError("packing needs the lengths of the completions")
    (g, k, t), fed = completions.shape, completions[..., :-1]
    layout = pack_tokens(
        prompt_lengths,
        jnp.maximum(lengths - 1, 0),
        prompts.shape[1],
        t - 1,
        shards=model.shards,
        size=packed_size,
    )
    first_gd, rest_snd = model.packed_hidden(params, prompts, fed, layout)
    first_gkd = jnp.broadcast_to(first_gd[:, None], (g, k, first_gd.shape[-1]))
    next_sn = layout.pack(jnp.zeros_like(prompts)[:, None], completions[..., 1:])[:, 0]

    def in_front(first_gk, rest_sn):
        rows = first_gk.reshape(model.shards, -1, *first_gk.shape[2:])
        return jnp.concatenate([rows, rest_sn], axis=1)

    logps_sn = logprobs(
        in_front(first_gkd, rest_snd),
        head_vd,
        in_front(completions[..., 0], next_sn),
        where=in_front(jnp.ones((g, k), bool), layout.of_completions),
    )
    first_gk, rest_sn = jnp.split(logps_sn, [g * k // model.shards], axis=1)
    _, rest_gkt = layout.unpack(rest_sn[:, None])
    logps_gkt = jnp.concatenate([first_gk.reshape(g, k, 1), rest_gkt], axis=2)
    return jnp.where(layout.fits, logps_gkt, jnp.nan)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    beta: float,
    micro_batches: int = 1,
    completion_parts: int = 1,
    packed_size: int | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on a batch of groups; what the loss is divided by is counted once, over them all.

    The gradient depends neither on `micro_batches` nor on `completion_parts`, which bound memory.
    Whole groups take one forward and one backward pass. Where groups are cut too, a first pass
    scores every completion, so that the weights are known, and a second one goes backward over any
    part: the gradient is linear in the weights.

    Args:
        state: parameters, optimizer state and step; donate it.
        batch: see `Batch`.
        model: the model as functions, see `gvpo_jax.models.decoder.DecoderFns`.
        optimizer: an Optax transformation.
        objective: what to minimise, e.g. `gvpo_jax.training.objectives.gvpo(beta=0.1)`.
        beta: of the metrics `gvpo_mse` and `weight_abs`, see `gvpo_weights`.
        micro_batches: parts of whole groups that the batch is cut into; where they do not divide,
            the last one is filled up.
        completion_parts: parts that the completions of each group are cut into, likewise.
        packed_size: see `token_logps`; of each part of the batch.

    Returns:
        The new state, and scalar metrics of the policy before the update.

    Raises:
        AssertionError: the batch's arrays do not have the shapes that `Batch` says.
    """
    _check_shapes(batch)
    batch = fill_up(batch, groups=micro_batches, completions=completion_parts)
    # The policy's own new samples: the ratio to itself is 1, whatever the sampler's rounding.
    own = (batch.version == state.step)[..., None]
    batch = batch._replace(old_logps=jnp.where(own, jnp.nan, batch.old_logps))
    advantages_gk = objective.advantages(batch.rewards, batch.valid)
    count = objective.count(advantages_gk, _mask(batch), batch.valid)
    logps_of = functools.partial(token_logps, model, packed_size=packed_size)
    if completion_parts > 1:
        loss = functools.partial(_share_of, objective, batch, advantages_gk, count)
        grads, logps = _two_passes(
            logps_of, state.params, batch, loss, micro_batches, completion_parts
        )
    else:
        gradient = jax.grad(functools.partial(_share, logps_of, objective), has_aux=True)
        parts = split_groups((batch, advantages_gk), micro_batches)
        grads, logps = _accumulate(gradient, state.params, parts, count)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    loss = _share_of(objective, batch, advantages_gk, count, logps)
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


def _share(logps_of, objective, params, batch: Batch, advantages_gk, count):
    """This part's share of the batch's loss, and its token log-probs."""
    logps_gkt = logps_of(
        params, batch.prompts, batch.prompt_lengths, batch.completions, batch.lengths
    )
    share = _share_of(objective, batch, advantages_gk, count, logps_gkt)
    return share, jax.lax.stop_gradient(logps_gkt)


def _share_of(objective, batch: Batch, advantages_gk, count, logps_gkt):
    here = jax.lax.stop_gradient(logps_gkt)
    old_gkt = jnp.where(jnp.isnan(batch.old_logps), here, batch.old_logps)
    total = objective.total(
        logps_gkt, old_gkt, batch.ref_logps, advantages_gk, _mask(batch), batch.valid
    )
    return total / count


def _accumulate(gradient, params, parts, count):
    """The parts' gradients added up, and all token log-probs."""
    if len(jax.tree.leaves(parts)[0]) == 1:
        grads, logps = gradient(params, *jax.tree.map(lambda x: x[0], parts), count)
        return grads, logps

    def add(total, part):
        grads, logps = gradient(params, *part, count)
        return jax.tree.map(jnp.add, total, grads), logps

    grads, logps = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return grads, join_groups(logps)


def _two_passes(logps_of, params, batch: Batch, loss, micro_batches, completion_parts):
    """As `_accumulate`, over parts of groups: scores first, then backward with known weights."""

    def cut(x_gk):
        x = split_completions(split_groups(x_gk, micro_batches), completion_parts)
        return x.reshape(-1, *x.shape[2:])

    def repeat(x):
        return jnp.repeat(split_groups(x, micro_batches), completion_parts, axis=0)

    parts = (
        repeat(batch.prompts),
        repeat(batch.prompt_lengths),
        cut(batch.completions),
        cut(batch.lengths),
    )
    _, scored = jax.lax.scan(lambda _, part: (None, logps_of(params, *part)), None, parts)
    scored = scored.reshape(micro_batches, completion_parts, *scored.shape[1:])
    logps_gkt = join_groups(join_completions(scored))
    weights = cut(jax.grad(loss)(logps_gkt))

    def add(total, part_and_weights):
        part, part_weights = part_and_weights
        _, backward = jax.vjp(lambda p: logps_of(p, *part), params)
        return jax.tree.map(jnp.add, total, backward(part_weights)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = jax.lax.scan(add, zeros, (parts, weights))
    return grads, logps_gkt


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
    """Share of the completions, mean residual and mean age in updates, by where they came from.

    The age is -1 where no completion bears a date.
    """
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
        dates = jnp.sum(dated)
        metrics[f"{name}/staleness"] = jnp.where(
            dates > 0, jnp.sum(age) / jnp.maximum(dates, 1), -1
        )
    return metrics


def _weights(diff_gkt, batch: Batch, beta):
    log_ratio = jnp.sum(diff_gkt, axis=-1)
    zeros = jnp.zeros_like(log_ratio)
    return gvpo_weights(log_ratio, zeros, batch.rewards, beta=beta, where=batch.valid)


def _mask(batch: Batch):
    """Tokens that belong to a valid completion, `[g, k, t]`."""
    return completion_mask(batch.lengths, batch.completions.shape[-1]) & batch.valid[..., None]
