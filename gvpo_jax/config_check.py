"""What a config must fulfil: ranges, and settings that go together."""

import re
import sys
from typing import Any

from gvpo_jax.errors import UserError

_MAX = sys.float_info.max


def check(c: Any) -> None:
    """That a `gvpo_jax.config.Config` can be run.

    Raises:
        UserError: a value out of range, or settings that do not go together.
    """
    for key, (value, least, most) in _ranges(c).items():
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" if most == _MAX else f"between {least} and {most}"
            raise UserError(f"{key} must be {limits}, got {value}")
    if not 0 < c.loss.beta <= _MAX:
        raise UserError(f"loss.beta must be > 0, got {c.loss.beta}; the paper uses 0.01 to 0.5")
    _check_loss(c)
    _check_sources(c)
    _check_servers(c)
    if not c.train.batch_size % c.train.micro_batches == 0:
        raise UserError(
            f"train.batch_size={c.train.batch_size} does not divide into "
            f"train.micro_batches={c.train.micro_batches}; use a multiple"
        )
    if not 0 < c.rollout.temperature <= _MAX:
        raise UserError(f"rollout.temperature must be > 0 in training, got {c.rollout.temperature}")
    if not (c.optimizer.b1 < 1 and c.optimizer.b2 < 1):
        raise UserError(
            f"optimizer.b1 and b2 must be < 1, got {c.optimizer.b1} and {c.optimizer.b2}"
        )
    if c.optimizer.max_grad_norm == 0:
        raise UserError("optimizer.max_grad_norm must be > 0; null switches clipping off")
    if not c.rollout.top_p > 0:
        raise UserError(f"rollout.top_p must be > 0, got {c.rollout.top_p}; 1 keeps every token")
    if c.rewards.weights and len(c.rewards.weights) != len(c.rewards.funcs):
        raise UserError(
            f"rewards.weights has {len(c.rewards.weights)} numbers for "
            f"{len(c.rewards.funcs)} functions"
        )


def _check_loss(c: Any) -> None:
    loss = c.loss
    if loss.huber_delta is not None and not 0 < loss.huber_delta <= _MAX:
        raise UserError(f"loss.huber_delta must be > 0, got {loss.huber_delta}; null: no clipping")
    if loss.huber_delta is not None and loss.name != "gvpo":
        raise UserError(f"loss.huber_delta is for gvpo, not for loss.name={loss.name}")
    clips = {"epsilon": loss.epsilon, "epsilon_high": loss.epsilon_high, "kl_coef": loss.kl_coef}
    given = [f"loss.{name}" for name, value in clips.items() if value]
    if given and loss.name in ("gvpo", "rebel", "dpo"):
        raise UserError(
            f"loss.name={loss.name} has neither clipping nor a KL penalty: leave out "
            f"{', '.join(given)}; loss.beta is the pull towards the reference"
        )
    if loss.name not in ("gvpo", "dpo"):
        if c.rollout.demonstrations or c.data.groups_path:
            raise UserError(
                f"loss.name={loss.name} needs the probability with which each completion was "
                "sampled; demonstrations and data.groups_path have none: use gvpo or dpo"
            )
        if c.rollout.temperature != 1:
            raise UserError(
                f"loss.name={loss.name} is right for samples of the policy itself: "
                f"rollout.temperature must be 1, got {c.rollout.temperature}; gvpo takes any"
            )
        if c.rollout.top_k or c.rollout.top_p < 1 or c.rollout.min_p:
            raise UserError(
                f"loss.name={loss.name} is right for samples of the policy itself: leave out "
                "rollout.top_k, top_p and min_p"
            )


def _check_sources(c: Any) -> None:
    r = c.replay
    given = c.rollout.demonstrations + r.completions
    if c.rollout.num_generations - given < 2:
        raise UserError(
            f"rollout.num_generations={c.rollout.num_generations} leaves fewer than two samples "
            f"beside {c.rollout.demonstrations} demonstrations and {r.completions} replayed"
        )
    if r.groups >= c.train.batch_size:
        raise UserError(
            f"replay.groups={r.groups} must be less than train.batch_size={c.train.batch_size}: "
            "some groups have to be new"
        )
    sampling = {
        "rollout.demonstrations": c.rollout.demonstrations,
        "rollout.lookahead": c.rollout.lookahead,
        "replay.completions": r.completions,
        "replay.groups": r.groups,
    }
    useless = [name for name, value in sampling.items() if value]
    if c.data.groups_path and useless:
        raise UserError(
            f"{', '.join(useless)}: nothing is sampled with data.groups_path; leave it out"
        )


def _check_servers(c: Any) -> None:
    r = c.rollout
    if r.engine == "in_process":
        if r.servers:
            raise UserError(
                "rollout.engine=in_process asks no servers: choose another engine, or "
                "rollout.servers=[]"
            )
        return
    cache = None if r.cache_dtype == "model" else r.cache_dtype
    for name, value in (("tensor", r.tensor), ("slots", r.slots), ("cache_dtype", cache)):
        if value is not None:
            raise UserError(f"rollout.{name} is for rollout.engine=in_process, not {r.engine}")
    if not r.servers:
        raise UserError(
            f"rollout.engine={r.engine} needs rollout.servers, e.g. [http://localhost:8000]"
        )
    if len(set(r.servers)) < len(r.servers):
        raise UserError("rollout.servers names a server twice")
    if not r.logp_tolerance > 0:
        raise UserError(f"rollout.logp_tolerance must be > 0, got {r.logp_tolerance}")
    if r.api_key_env is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", r.api_key_env):
        raise UserError("rollout.api_key_env is the name of an environment variable, not a key")
    if c.data.groups_path and not (c.data.eval_size and (c.data.eval_path or c.data.tasks)):
        raise UserError(
            f"rollout.engine={r.engine}: nothing is sampled with data.groups_path and without "
            "held-out rows; leave it out"
        )


def _ranges(c: Any) -> dict[str, tuple[float | None, float, float]]:
    """Value, least and most of every key that has such limits; NaN and infinities lie outside."""
    return {
        "run.seed": (c.run.seed, 0, 2**31 - 1),
        "data.train_size": (c.data.train_size, 1, _MAX),
        "data.eval_size": (c.data.eval_size, 0, _MAX),
        "data.max_prompt_length": (c.data.max_prompt_length, 1, _MAX),
        "rollout.num_generations": (c.rollout.num_generations, 2, _MAX),
        "rollout.max_completion_length": (c.rollout.max_completion_length, 1, _MAX),
        "rollout.top_k": (c.rollout.top_k, 0, _MAX),
        "rollout.top_p": (c.rollout.top_p, 0, 1),
        "rollout.min_p": (c.rollout.min_p, 0, 1),
        "rollout.demonstrations": (c.rollout.demonstrations, 0, _MAX),
        "rollout.lookahead": (c.rollout.lookahead, 0, _MAX),
        "rollout.tensor": (c.rollout.tensor, 1, _MAX),
        "rollout.slots": (c.rollout.slots, 1, _MAX),
        "rollout.timeout": (c.rollout.timeout, 1, 86_400),
        "rollout.retries": (c.rollout.retries, 0, 100),
        "rollout.concurrency": (c.rollout.concurrency, 1, _MAX),
        "rollout.logp_tolerance": (c.rollout.logp_tolerance, 0, _MAX),
        "replay.completions": (c.replay.completions, 0, _MAX),
        "replay.groups": (c.replay.groups, 0, _MAX),
        "replay.capacity": (c.replay.capacity, 1, _MAX),
        "loss.epsilon": (c.loss.epsilon, 0, _MAX),
        "loss.epsilon_high": (c.loss.epsilon_high, 0, _MAX),
        "loss.kl_coef": (c.loss.kl_coef, 0, _MAX),
        "reference.refresh_every": (c.reference.refresh_every, 1, _MAX),
        "reference.decay": (c.reference.decay, 0, 1),
        "optimizer.learning_rate": (c.optimizer.learning_rate, 0, _MAX),
        "optimizer.warmup_steps": (c.optimizer.warmup_steps, 0, _MAX),
        "optimizer.b1": (c.optimizer.b1, 0, 1),
        "optimizer.b2": (c.optimizer.b2, 0, 1),
        "optimizer.eps": (c.optimizer.eps, 0, _MAX),
        "optimizer.weight_decay": (c.optimizer.weight_decay, 0, _MAX),
        "optimizer.max_grad_norm": (c.optimizer.max_grad_norm, 0, _MAX),
        "train.steps": (c.train.steps, 1, _MAX),
        "train.batch_size": (c.train.batch_size, 1, _MAX),
        "train.steps_per_generation": (c.train.steps_per_generation, 1, _MAX),
        "train.num_iterations": (c.train.num_iterations, 1, _MAX),
        "train.micro_batches": (c.train.micro_batches, 1, _MAX),
        "train.completion_parts": (c.train.completion_parts, 1, _MAX),
        "train.stop_at": (c.train.stop_at, 1, _MAX),
        "eval.every": (c.eval.every, 0, _MAX),
        "eval.num_generations": (c.eval.num_generations, 1, _MAX),
        "eval.temperature": (c.eval.temperature, 0, _MAX),
        "eval.batch_size": (c.eval.batch_size, 1, _MAX),
        "checkpoint.every": (c.checkpoint.every, 1, _MAX),
        "checkpoint.keep": (c.checkpoint.keep, 1, _MAX),
        "log.completions_every": (c.log.completions_every, 1, _MAX),
        "log.samples": (c.log.samples, 0, _MAX),
        "distributed.num_processes": (c.distributed.num_processes, 1, _MAX),
        "distributed.process_id": (c.distributed.process_id, 0, _MAX),
        "distributed.initialization_timeout": (c.distributed.initialization_timeout, 1, _MAX),
        "distributed.heartbeat_timeout": (c.distributed.heartbeat_timeout, 1, _MAX),
    }
