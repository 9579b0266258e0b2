"""GVPO inside google-tunix: Tunix samples, scores the reference and updates; the loss is ours.

Tunix finds its policy losses and advantage estimators by name. `gvpo_config` is a `GRPOConfig` that
names ours, `gvpo_learner` the `GRPOLearner` for it:

    learner = gvpo_learner(rl_cluster, gvpo_config(beta=0.1, num_generations=8), reward_fns)
    learner.train(dataset)

Written against release 0.1.7, whose losses return `(loss, metrics)`, and against the main branch
after it, whose losses return a sum and what to divide it by.
"""

import dataclasses
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.errors import UserError
from gvpo_jax.installed import NotInstalled
from gvpo_jax.loss import group, gvpo_mse, gvpo_weights

try:
    from flax import nnx
except ImportError:
    raise NotInstalled('the loss in Tunix needs flax: pip install "gvpo-jax[tunix]"') from None

NAME = "gvpo-jax"
METRICS = ("kl", "log_ratio", "gvpo_mse")


def register_gvpo() -> None:
    """Add our policy loss and advantage estimator to Tunix's registry, both as "gvpo-jax".

    `gvpo_config` does it; a second time changes nothing.

    Raises:
        UserError: google-tunix is missing, or its interface is neither of those we know.
    """
    registry = _tunix().registry
    if NAME not in registry.default_registry.list_functions("policy_loss_fn"):
        registry.register_policy_loss_fn(NAME)(gvpo_policy_loss)
        registry.register_advantage_estimator(NAME)(centred_rewards)


def gvpo_config(
    *,
    beta: float = 0.1,
    num_generations: int = 8,
    num_iterations: int = 1,
    reward_manager: str = "sequence-level",
) -> Any:
    """A Tunix `GRPOConfig` with GVPO's loss and estimator, for `gvpo_learner`.

    GRPO's other fields (clipping, aggregation, KL, importance sampling) have no influence. A
    `GRPOLearner` of your own takes the config too, but leaves end tokens out of the log-probs.

    Args:
        beta: see `gvpo_jax.gvpo_weights`; above 0, it is also what makes Tunix score the reference.
        num_generations: k, completions per prompt.
        num_iterations: updates per batch of samples; GVPO needs no correction for several.
        reward_manager: Tunix's name of what adds up the reward functions.

    Raises:
        UserError: beta <= 0, k < 2, or as for `register_gvpo`.
    """
    if not beta > 0:
        raise UserError(f"beta must be > 0, got {beta}")
    if num_generations < 2:
        raise UserError(f"GVPO compares at least 2 completions, got {num_generations=}")
    register_gvpo()
    return _tunix().config(
        advantage_estimator=NAME,
        policy_loss_fn=NAME,
        reward_manager=reward_manager,
        num_generations=num_generations,
        num_iterations=num_iterations,
        beta=beta,
    )


def gvpo_learner(rl_cluster: Any, algo_config: Any, reward_fns: Any, **options: Any) -> Any:
    """Tunix's `GRPOLearner`, with the arguments of its constructor, set up for GVPO.

    Beyond the constructor it refuses what GVPO cannot learn from before anything is sampled, and
    changes two things in `rl_cluster`: Tunix's own sampler hands on the end token that it samples
    (it drops it, and with it the decision to stop would be left out of every log-prob), and the
    trainer logs `kl`, `log_ratio` and `gvpo_mse` (see `gvpo_jax.gvpo_mse`: the number to plot).
    Log-probs are those at the sampler's temperature, as everywhere in Tunix.

    Raises:
        UserError: sequence packing, no reference model, a pad token that is also an end token,
            several end tokens with Tunix's own sampler, or a config not made by `gvpo_config`.
    """
    tunix = _tunix()
    if (algo_config.policy_loss_fn, algo_config.advantage_estimator) != (NAME, NAME):
        raise UserError("GVPO needs its own loss and estimator: make the config with gvpo_config()")
    if rl_cluster.cluster_config.training_config.max_seq_token_per_tpu is not None:
        raise UserError(_PACKED)
    _check_reference(rl_cluster)
    _check_sampling(rl_cluster, tunix)
    if isinstance(rl_cluster.rollout, tunix.own_rollout):
        _keep_end_tokens(rl_cluster.rollout)
    learner = tunix.learner(rl_cluster, algo_config, reward_fns, **options)
    rl_cluster.actor_trainer.with_rl_metrics_to_log(dict.fromkeys(METRICS, np.mean))
    return learner


def centred_rewards(rewards: Any, num_generations: int) -> np.ndarray:
    """Advantage estimator: reward minus the mean of its group, `[G*k]`, in units of the reward.

    GVPO's optimum depends on that unit: an estimator that divides by the group's standard deviation
    would change it.

    Raises:
        UserError: the rewards do not divide into groups.
    """
    rewards = np.asarray(rewards, np.float64)
    _check_whole(rewards.size, num_generations)
    rewards_gk = rewards.reshape(-1, num_generations)
    return (rewards_gk - rewards_gk.mean(-1, keepdims=True)).reshape(-1).astype(np.float32)


def gvpo_policy_loss(
    model: Any, train_example: Any, algo_config: Any, pad_id: int, eos_id: int, **options: Any
) -> Any:
    """Policy loss: `gvpo_jax.gvpo_loss` of a batch of Tunix's, rows of one prompt side by side.

    Only beta, num_generations and the sampler's temperature are read from the config. Rows that
    divide into groups but are not of one prompt each give a NaN and no gradient.

    Returns:
        What Tunix's own losses return: a pair of loss and metrics in 0.1.7, a `LossOutput` later.

    Raises:
        UserError: packed sequences, rows that do not divide into groups, no reference log-probs, a
            pad token that is also the end token, or an option that we do not know.
    """
    k, beta = algo_config.num_generations, algo_config.beta
    _check_example(train_example, k, pad_id, eos_id)
    tunix = _tunix()
    options = {"temperature": getattr(algo_config, "temperature", None), **options}
    logps_bt = _token_logps(tunix, model, train_example, pad_id, eos_id, **options)
    mask_bt = train_example.completion_mask.astype(bool)
    diff_bt = jnp.where(mask_bt, logps_bt - train_example.ref_per_token_logps, 0)
    log_ratio_gk = group(jnp.sum(diff_bt, axis=-1), k)
    logps_gk = group(jnp.sum(jnp.where(mask_bt, logps_bt, 0), axis=-1), k)
    rewards_gk = group(jnp.asarray(train_example.advantages, jnp.float32), k)

    # As in gvpo_loss; from the log-ratio, which keeps digits that long log-probs have lost.
    zeros_gk = jnp.zeros_like(log_ratio_gk)
    weights_gk = gvpo_weights(log_ratio_gk, zeros_gk, rewards_gk, beta=beta)
    total = -beta * jnp.sum(weights_gk * logps_gk) / (k - 1)
    prompts_gkp = group(train_example.prompt_ids, k)
    torn = jnp.any(prompts_gkp != prompts_gkp[:, :1])
    metrics = {
        "kl": jnp.sum(jnp.exp(-diff_bt) + diff_bt - 1) / jnp.maximum(jnp.sum(mask_bt), 1),
        "log_ratio": jnp.mean(log_ratio_gk),
        "gvpo_mse": gvpo_mse(log_ratio_gk, zeros_gk, rewards_gk, beta=beta),
        "pg_clipfrac": jnp.zeros(()),  # GRPOLearner asks for it; nothing is ever clipped
    }
    groups = jnp.float32(log_ratio_gk.shape[0])
    return tunix.output(jnp.where(torn, jnp.nan, total), groups, jax.lax.stop_gradient(metrics))


_PACKED = (
    "sequence packing tears groups apart and GVPO compares a group's completions: "
    "leave max_seq_token_per_tpu unset"
)


def _check_whole(rows: int, k: int) -> None:
    if rows % k:
        raise UserError(f"{rows} completions do not divide into groups of num_generations={k}")


def _check_example(example: Any, k: int, pad_id: int, eos_id: int) -> None:
    if getattr(example, "segment_ids", None) is not None:
        raise UserError(_PACKED)
    _check_whole(example.completion_ids.shape[0], k)
    if example.ref_per_token_logps is None:
        raise UserError("the batch has no reference log-probs: beta must be > 0 in the config")
    _check_padding(pad_id, {eos_id})


def _check_padding(pad_id: int, ends: set[int]) -> None:
    if pad_id in ends:
        raise UserError(
            f"token {pad_id} both pads and ends a completion, and Tunix leaves padding out of "
            "prompts and log-probs: give the tokenizer a pad token of its own"
        )


def _check_reference(cluster: Any) -> None:
    if worker := getattr(cluster, "inference_worker", None):
        try:
            worker.get_model("reference")
        except ValueError:
            raise UserError("GVPO needs a reference: give RLCluster a reference model") from None


def _check_sampling(cluster: Any, tunix: SimpleNamespace) -> None:
    found = cluster.cluster_config.rollout_config
    by_mode = found if isinstance(found, dict) else {"train": found}
    configs, rollout = list(by_mode.values()), cluster.rollout
    ends = {end for c in configs for end in c.eos_tokens or [rollout.eos_id()]}
    _check_padding(rollout.pad_id(), ends)
    if isinstance(rollout, tunix.own_rollout) and any(len(c.eos_tokens or []) > 1 for c in configs):
        raise UserError(
            "Tunix's own sampler does not tell which of several end tokens it sampled: "
            "give rollout_config one in eos_tokens, the one that the model was trained to end with"
        )
    training = [c for mode, c in by_mode.items() if getattr(mode, "value", mode) == "train"]
    if any(c.temperature == 0 or (c.top_p or 1) < 1 or (c.top_k or 0) > 0 for c in training):
        warnings.warn(
            "top_k, top_p and temperature 0 keep some tokens from ever being sampled: GVPO's "
            "optimum is then not reached, because the samples do not cover the reference",
            stacklevel=3,
        )


def _keep_end_tokens(rollout: Any) -> None:
    """Make `generate` return the end token too, where one was sampled.

    Tunix cuts the completion before it; a completion shorter than the limit had one.
    """
    generate = rollout.generate

    @functools.wraps(generate)
    def generate_with_ends(prompts: Any, rollout_config: Any, **options: Any) -> Any:
        output = generate(prompts, rollout_config, **options)
        end = (rollout_config.eos_tokens or [rollout.eos_id()])[0]
        limit = rollout_config.max_tokens_to_generate
        tokens = [
            np.append(row, np.asarray(end, np.asarray(row).dtype))
            if len(row) < limit and not (len(row) and row[-1] == end)
            else row
            for row in output.tokens
        ]
        return dataclasses.replace(output, tokens=tokens)

    rollout.generate = generate_with_ends


def _tunix() -> SimpleNamespace:
    """What we use of Tunix."""
    try:
        learner = importlib.import_module("tunix.rl.grpo.grpo_learner")
        registry = importlib.import_module("tunix.rl.function_registry")
        common = importlib.import_module("tunix.rl.common")
        rollout = importlib.import_module("tunix.rl.rollout.vanilla_rollout")
        utils = importlib.import_module("tunix.sft.utils")
    except ImportError as error:
        raise _not_imported(error) from None
    try:
        tunix = SimpleNamespace(
            registry=registry,
            config=learner.GRPOConfig,
            learner=learner.GRPOLearner,
            own_rollout=rollout.VanillaRollout,
            token_logps=common.compute_per_token_logps,
            output=_output(utils),
        )
        _need(tunix.registry.register_policy_loss_fn, "name")
        _need(tunix.registry.register_advantage_estimator, "name")
        _need(tunix.registry.default_registry.list_functions, "category")
    except AttributeError as error:
        raise _unknown(str(error)) from None
    _need(tunix.config, "policy_loss_fn advantage_estimator reward_manager")
    _need(tunix.config, "num_generations num_iterations beta")
    _need(tunix.token_logps, "graphdef state prompt_tokens completion_tokens pad_id eos_id")
    _need(tunix.token_logps, "stop_gradient temperature")
    return tunix


def _output(utils: Any) -> Callable[..., Any]:
    """What makes a loss's result of a sum, its divisor and metrics.

    0.1.7 wants the mean; later versions divide themselves, over all micro-batches at once.
    """
    if not hasattr(utils, "LossOutput"):
        return lambda total, groups, metrics: (total / groups, metrics)
    _need(utils.LossOutput, "primary_loss aux_metrics")
    _need(utils.WeightedMetric, "unreduced_sum denominator")
    return lambda total, groups, metrics: utils.LossOutput(
        primary_loss=utils.WeightedMetric(unreduced_sum=total, denominator=groups),
        aux_metrics=metrics,
    )


def _need(function: Callable[..., Any], names: str) -> None:
    missing = set(names.split()) - set(inspect.signature(function).parameters)
    if missing:
        where = getattr(function, "__qualname__", function)
        raise _unknown(f"{where} has no {', '.join(sorted(missing))}")


def _not_imported(error: ImportError) -> UserError:
    name = error.name or ""
    if name == "tunix" or _release() is None:
        return UserError('google-tunix is missing: pip install "gvpo-jax[tunix]"')
    if not isinstance(error, ModuleNotFoundError) or name.startswith("tunix."):
        return _unknown(str(error))
    return UserError(f'google-tunix needs {name}: pip install "gvpo-jax[tunix]"')


def _unknown(what: str) -> UserError:
    return UserError(
        f"google-tunix {_release() or 'of unknown version'} is not as gvpo-jax knows it ({what}): "
        "pip install google-tunix==0.1.7"
    )


def _release() -> str | None:
    try:
        return version("google-tunix")
    except PackageNotFoundError:
        return None


def _token_logps(
    tunix, model, example, pad_id, eos_id, *, temperature, compute_logps_chunk_size=None, **unknown
) -> jax.Array:
    """Log-probs [b, t] of the completions, float32 nats, in Tunix's own way of scoring."""
    if names := sorted(name for name, value in unknown.items() if value is not None):
        raise _unknown(f"it calls losses with {', '.join(names)}")
    routed_experts = getattr(example, "routed_experts", None)
    extra = {"chunk_size": compute_logps_chunk_size, "routed_experts": routed_experts}
    extra = {name: value for name, value in extra.items() if value is not None}
    _need(tunix.token_logps, " ".join(extra))
    graphdef, state = nnx.split(model)
    logps = tunix.token_logps(
        graphdef,
        state,
        prompt_tokens=example.prompt_ids,
        completion_tokens=example.completion_ids,
        pad_id=pad_id,
        eos_id=eos_id,
        stop_gradient=False,
        temperature=1.0 if temperature is None else temperature,
        **extra,
    )
    return logps.astype(jnp.float32)
