"""One update of the policy: score the groups, weigh them, step. Pure functions; callers jit."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from gvpo_jax.baselines import Objective
from gvpo_jax.data.batch import Batch, fill_up, join_completions, split_completions
from gvpo_jax.data.groups import UNKNOWN, Source
from gvpo_jax.logprobs import CHUNK_BYTES, completion_mask, token_logprobs
from gvpo_jax.loss import gvpo_mse, gvpo_weights
from gvpo_jax.models.lora import Params, join
from gvpo_jax.ops.packing import pack_tokens
from gvpo_jax.precision import float_type
from gvpo_jax.settings import setting
from gvpo_jax.training.balance import Load, aux_loss, counted_tokens, load_metrics, load_of

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class TrainConfig:
    """How many updates there are, and how each is computed."""

    steps: int | None = setting(
        None, "Updates in all; null: those of train.epochs, or else 100.", least=1
    )
    epochs: float | None = setting(
        None,
        "Passes over the rows, in place of train.steps: as many updates as they take, rounded up "
        "to a rollout.",
        above=0,
    )
    batch_size: int = setting(8, "Prompts per update.", least=1)
    steps_per_generation: int = setting(
        1,
        "Updates' worth of prompts that one rollout samples, all at once; rollout.slots bounds the "
        "memory of their completions.",
        least=1,
    )
    num_iterations: int = setting(1, "Passes over each rollout.", least=1)
    micro_batches: int = setting(
        1, "Parts of whole groups per update, to save memory; same gradient.", least=1, free=True
    )
    completion_parts: int = setting(
        1,
        "Parts that each group's completions are cut into, where a group is too large for memory: "
        "one more forward pass, same gradient.",
        least=1,
        free=True,
    )
    packing: bool = setting(
        True, "Leave out, but for attention, what pads prompts and completions.", free=True
    )
    stop_at: int | None = setting(
        None,
        "End this session when the run has so many updates; the next start goes on.",
        least=1,
        free=True,
    )

    @property
    def updates(self) -> int:
        """Updates in all, where `settled` has been asked or no `epochs` are given."""
        return self.steps or 100

    def settled(self, rows: int, per_update: int) -> "TrainConfig":
        """With `steps` in place of `epochs`, over so many rows, of which an update takes so many.

        A rollout takes them for `steps_per_generation` updates, each done `num_iterations` times.
        """
        if self.epochs is None:
            return dataclasses.replace(self, steps=self.updates)
        visits = Fraction(str(self.epochs)) * rows  # 0.1 is a tenth
        rollouts = math.ceil(visits / (per_update * self.steps_per_generation))
        steps = rollouts * self.steps_per_generation * self.num_iterations
        return dataclasses.replace(self, steps=steps, epochs=None)


@dataclass(frozen=True)
class ReferenceConfig:
    """The policy that beta pulls towards."""

    name: Literal["initial", "previous", "ema"] = setting(
        "initial", "The start weights, the policy that sampled, or an average of policies."
    )
    refresh_every: int = setting(
        1, "previous: updates between refreshes, rounded up to a rollout.", least=1
    )
    decay: float = setting(0.99, "ema: per update.", least=0, most=1)


class TrainState(NamedTuple):
    """What an update changes. `step` counts updates, int32."""

    params: Any
    opt_state: Any
    step: jax.Array

    def rest(self) -> dict[str, Any]:
        """What updates need beside the parameters."""
        return {"opt_state": self.opt_state, "step": self.step}


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
        prompts: `[g, p]` token ids.
        prompt_lengths: `[g]`.
        completions: `[g, k, t]` token ids.
        lengths: `[g, k]` tokens of each completion, which only packing needs.
        packed_size: tokens to compute in each of the `model.shards` parts of the batch, see
            `gvpo_jax.data.packing_plan.make_plan`; all is NaN where they are too few. None, or for
            a model without `packed_hidden`: all tokens, padding too.
    """

    def run(name: str, *arrays):
        return getattr(model, name)(params, *arrays), None

    batch = prompts, prompt_lengths, completions, lengths
    return _token_logps(model, params, run, batch, packed_size)[0]


def token_logps_and_load(
    model: Any,
    params: Any,
    batch: tuple[jax.Array, ...],
    counted: tuple[jax.Array, jax.Array],
    *,
    packed_size: int | None = None,
) -> tuple[jax.Array, Load | None]:
    """`token_logps`, and the load of the model's experts; None: it has none.

    Args:
        model: see `gvpo_jax.models.decoder.DecoderFns`.
        params: its parameters.
        batch: prompts, prompt_lengths, completions and lengths, see `token_logps`.
        counted: see `gvpo_jax.training.balance.counted_tokens`.
        packed_size: see `token_logps`.
    """
    if model.routed is None:
        return token_logps(model, params, *batch, packed_size=packed_size), None

    def run(name: str, *arrays):
        return model.routed(name, params, *arrays)

    logps, routings, layout = _token_logps(model, params, run, batch, packed_size)
    if layout is None:
        pairs = zip(routings, counted, strict=True)
    else:
        pairs = [(routings, layout.pack(*counted))]
    loads = [load_of(*pair) for pair in pairs if pair[0]]
    return logps, jax.tree.map(lambda *x: sum(x), *loads)


def _token_logps(model, params, run, batch, packed_size):
    """Log-probs, the routing that `run` gives beside the results of a function, and the packing."""
    prompts, prompt_lengths, completions, lengths = batch
    head_vd, shards = model.head(params), model.shards
    limits = {"chunk_bytes": model.chunk_bytes * shards, "kept_bytes": CHUNK_BYTES * shards}
    limits |= {"cap": model.logit_cap, "vocabulary_blocks": model.vocabulary_blocks}
    if packed_size is None or model.packed_hidden is None:
        hidden, routings = run("completion_hidden", prompts, prompt_lengths, completions)
        return token_logprobs(hidden, head_vd, completions, **limits), routings, None
    if lengths is None:
        raise ValueError("packing needs the lengths of the completions")
    (g, k, t), p = completions.shape, prompts.shape[1]
    fed_gk = jnp.maximum(lengths - 1, 0)
    layout = pack_tokens(prompt_lengths, fed_gk, p, t - 1, shards=shards, size=packed_size)
    (first_gd, rest_snd), routings = run("packed_hidden", prompts, completions[..., :-1], layout)
    first_gkd = jnp.broadcast_to(first_gd[:, None], (g, k, first_gd.shape[-1]))
    next_sn = layout.pack(jnp.zeros_like(prompts)[:, None], completions[..., 1:])[:, 0]

    def in_front(first_gk, rest_sn):
        rows = first_gk.reshape(shards, -1, *first_gk.shape[2:])
        return jnp.concatenate([rows, rest_sn], axis=1)

    logps_sn = token_logprobs(
        in_front(first_gkd, rest_snd),
        head_vd,
        in_front(completions[..., 0], next_sn),
        where=in_front(jnp.ones((g, k), bool), layout.of_completions),
        **limits,
    )
    first_gk, rest_sn = jnp.split(logps_sn, [g * k // shards], axis=1)
    _, rest_gkt = layout.unpack(rest_sn[:, None])
    logps_gkt = jnp.concatenate([first_gk.reshape(g, k, 1), rest_gkt], axis=2)
    return jnp.where(layout.fits, logps_gkt, jnp.nan), routings, layout


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
    *,
    model: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    beta: float,
    rates: optax.Schedule | None = None,
    micro_batches: int = 1,
    completion_parts: int = 1,
    packed_size: int | None = None,
    router_aux_coef: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One update on a batch of groups; what the loss is divided by is counted once, over them all.

    The gradient depends neither on `micro_batches` nor on `completion_parts`, which bound memory.
    Whole groups take one forward and one backward pass. Where groups are cut too, a first pass
    scores every completion, so that the weights are known, and a second one goes backward over any
    part: the gradient is linear in the weights.

    Args:
        state: parameters, optimizer state and step; donate it.
        batch: see `Batch`.
        frozen: the model's parameters beside those of the state; default: there are none.
        model: see `gvpo_jax.models.decoder.DecoderFns`.
        optimizer: an Optax transformation.
        objective: what to minimise, e.g. `gvpo_jax.training.objectives.gvpo(beta=0.1)`.
        beta: of the metrics `gvpo_mse` and `weight_abs`, see `gvpo_weights`.
        rates: the learning rate over updates, for the metrics.
        micro_batches: parts of whole groups that the batch is cut into; where they do not divide,
            the last one is filled up.
        completion_parts: parts that the completions of each group are cut into, likewise.
        packed_size: see `token_logps`; of each part of the batch.
        router_aux_coef: of `gvpo_jax.training.balance.aux_loss`, which is added for a mixture of
            experts. It is that of each micro-batch, weighted by its tokens: it depends on
            `micro_batches`, but on nothing else that a batch is cut into.

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

    def loss_of(logps_gkt, batch: Batch, advantages_gk):
        """What these groups add to the batch's loss."""
        here = jax.lax.stop_gradient(logps_gkt)
        old_gkt = jnp.where(jnp.isnan(batch.old_logps), here, batch.old_logps)
        of_part = advantages_gk, _mask(batch), batch.valid
        total = objective.total(logps_gkt, old_gkt, batch.ref_logps, *of_part)
        return total / count

    tokens = sum(map(jnp.sum, counted_tokens(batch)))

    def balance(load: Load | None):
        """What these tokens add to the load balancing loss."""
        if load is None or not router_aux_coef:
            return jnp.zeros(())
        return router_aux_coef * aux_loss(load) * load.tokens / jnp.maximum(tokens, 1)

    params, fixed = stacked(model, state.params), stacked(model, frozen)

    def logps_of(params, arrays, counted):
        logps_gkt, load = token_logps_and_load(
            model, join(fixed, params), arrays, counted, packed_size=packed_size
        )
        return logps_gkt, load if router_aux_coef else jax.lax.stop_gradient(load)

    def part_loss(params, batch: Batch, advantages_gk):
        computed = logps_of(params, batch[:4], counted_tokens(batch))  # from prompts to lengths
        loss = loss_of(computed[0], batch, advantages_gk) + balance(computed[1])
        return loss, jax.lax.stop_gradient(computed)

    def gradient(params, batch: Batch, advantages_gk):
        grads, computed = jax.grad(part_loss, has_aux=True)(params, batch, advantages_gk)
        return _wide(grads), computed

    if completion_parts > 1:
        gradient = functools.partial(_in_two_passes, logps_of, loss_of, balance, completion_parts)
    if micro_batches > 1:
        size = len(batch.prompts) // micro_batches
        add_up = optax.microbatching.AccumulationType
        gradient = optax.microbatching.microbatch(
            gradient, (1, 2), size, accumulator=(add_up.SUM, (add_up.CONCAT, add_up.SUM))
        )
    grads, (logps, load) = gradient(params, batch, advantages_gk)
    if model.stacking is not None:
        grads = model.stacking.unstack(grads)
    grads = jax.tree.map(lambda x, param: x.astype(param.dtype), grads, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = _metrics(logps, batch, beta, state.step)
    metrics |= {"loss": loss_of(logps, batch, advantages_gk), "grad_norm": optax.tree.norm(grads)}
    if load is not None:
        metrics |= load_metrics(load)
    if rates is not None:
        metrics["learning_rate"] = jnp.asarray(rates(state.step))
    return TrainState(params, opt_state, state.step + 1), metrics


def stacked(model: Any, params: Params | None) -> Params:
    """The parameters as `token_logps` and the gradient take them: layers that are alike in one."""
    if params is None:
        return {}
    return params if model.stacking is None else model.stacking.stack(params)


def _wide(tree):
    """In float32 at least, in which gradients of parts add up."""
    return jax.tree.map(lambda x: x.astype(float_type(x)), tree)


def _check_shapes(batch: Batch) -> None:
    chex.assert_rank([batch.prompts, batch.completions, batch.rewards], [2, 3, 2])
    chex.assert_equal_shape(
        [batch.lengths, batch.rewards, batch.valid, batch.source, batch.version]
    )
    chex.assert_equal_shape([batch.completions, batch.ref_logps, batch.old_logps])
    chex.assert_equal_shape_prefix([batch.completions, batch.rewards], 2)
    chex.assert_equal_shape_prefix([batch.prompts, batch.prompt_lengths, batch.rewards], 1)


def _in_two_passes(logps_of, loss_of, balance, parts, params, batch: Batch, advantages_gk):
    """The gradient, over parts of groups: log-probs first, then backward with known weights."""
    cut: Any = functools.partial(split_completions, parts=parts)
    of_prompts, of_completions = counted_tokens(batch, parts)
    pieces = cut(batch.completions), cut(batch.lengths), cut(of_completions)

    def logps_of_part(params, part):
        arrays = batch.prompts, batch.prompt_lengths, *part[:2]
        return logps_of(params, arrays, (of_prompts, part[2]))

    logps, loads = jax.lax.map(lambda part: logps_of_part(params, part), pieces)
    logps_gkt, load = join_completions(logps), jax.tree.map(lambda x: jnp.sum(x, axis=0), loads)
    weights = cut(jax.grad(loss_of)(logps_gkt, batch, advantages_gk))
    weights_of_load = jax.grad(balance)(load)

    def add(total, part_and_weights):
        part, part_weights = part_and_weights
        _, backward = jax.vjp(lambda p: logps_of_part(p, part), params)
        grads = backward((part_weights, weights_of_load))[0]
        return jax.tree.map(jnp.add, total, _wide(grads)), None

    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, _wide(params)), (pieces, weights))
    return grads, (logps_gkt, load)


def _metrics(logps_gkt, batch: Batch, beta, step) -> Metrics:
    """Scalars that say how the batch looks under the policy that produced the gradient.

    `kl` is the mean over tokens of expm1(r) - r with r = ref - policy: non-negative, an unbiased
    estimate of KL(policy || reference) per token for samples of the policy. For every source of
    completions: their share, mean residual, and mean age in updates, -1 where none bears a date.
    """
    mask, valid = _mask(batch), batch.valid
    diff = jnp.where(mask, logps_gkt - batch.ref_logps, 0)
    log_ratio = jnp.sum(diff, axis=-1)
    arrays = log_ratio, jnp.zeros_like(log_ratio), batch.rewards
    weights, mse = jnp.zeros_like(log_ratio), jnp.zeros(())
    if valid.shape[-1] > 1:  # a single completion is compared with none
        weights = gvpo_weights(*arrays, beta=beta, where=valid)
        mse = gvpo_mse(*arrays, beta=beta, where=valid)
    completions = jnp.maximum(jnp.sum(valid), 1)
    metrics = {
        "gvpo_mse": mse,
        "kl": _mean(jnp.expm1(-diff) + diff, mask),
        "log_ratio": jnp.sum(log_ratio) / completions,
        "weight_abs": jnp.sum(jnp.abs(weights)) / completions,
        "entropy_sampled": -_mean(logps_gkt, mask),
    }
    for source in Source:
        name, theirs = f"source/{source.name.lower()}", valid & (batch.source == source)
        dated = theirs & (batch.version != UNKNOWN)
        age = _mean(step - batch.version, dated)
        metrics[f"{name}/share"] = jnp.sum(theirs) / completions
        metrics[f"{name}/residual"] = _mean(weights, theirs)
        metrics[f"{name}/staleness"] = jnp.where(jnp.sum(dated) > 0, age, -1)
    return metrics


def _mean(x, where):
    """Of what counts; 0 where nothing does."""
    return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)


def _mask(batch: Batch):
    """Tokens that belong to a valid completion, `[g, k, t]`."""
    return completion_mask(batch.lengths, batch.completions.shape[-1]) & batch.valid[..., None]
