"""A run's settings: frozen dataclasses whose comments are the manual, from YAML and `key=value`."""

import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from gvpo_jax.errors import UserError


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/run"  # holds everything the run writes; a second start on it resumes
    seed: int = 0  # data order, sampling
    # Where the command line keeps compiled programs for the next start, on each machine; null:
    # nowhere. JAX_COMPILATION_CACHE_DIR goes first.
    compilation_cache: str | None = "~/.cache/gvpo-jax"


@dataclass(frozen=True)
class ModelConfig:
    # A hub name, a folder of safetensors, a .gguf file, package://PACKAGE/FILE.gguf, or "debug".
    name: str = "debug"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    # What the backward pass computes again, to save memory: nothing; all but products with weights;
    # whole layers.
    remat: Literal["none", "dots", "layer"] = "none"
    # Of prompts, scoring and training. "auto": in bfloat16 splash on TPU, cuDNN on GPU; else XLA.
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"


@dataclass(frozen=True)
class TaskConfig:
    """A reasoning-gym task; needs the extra `tasks`."""

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # the task's own options
    # The prompt, a format string over the item's metadata; empty: the task's own question.
    question: str = ""
    answer_prefix: str = ""  # text put at the start of the answer
    weight: float = 1.0  # share of the rows


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # JSONL or parquet with a column `prompt`, or ...
    eval_path: str | None = None  # (held-out rows, same columns)
    tasks: list[TaskConfig] = field(default_factory=list)  # ... generated tasks, or ...
    groups_path: str | None = None  # ... groups sampled elsewhere, see gvpo_jax/collect/offline.py
    # A completion in groups_path that is empty, too long or without a finite reward, and a group
    # that keeps fewer than two: "skip" counts them.
    bad_samples: Literal["error", "skip"] = "error"
    train_size: int = 1000  # rows drawn from the tasks
    # Held-out rows, drawn from the tasks, or the first ones of eval_path; 0: no evaluation.
    eval_size: int = 256
    eval_seed: int = 0  # the held-out rows do not follow run.seed, so that runs can be compared
    chat_template: Literal["auto", "never", "always"] = "auto"  # "auto": for lists of messages only
    template: str | None = None  # a Jinja chat template in place of the tokenizer's own
    system_prompt: str | None = None
    max_prompt_length: int = 512  # tokens
    too_long: Literal["error", "skip"] = "error"  # longer prompts are never cut


@dataclass(frozen=True)
class RolloutConfig:
    num_generations: int = 4  # k, completions per prompt
    max_completion_length: int = 256  # tokens, the end token included
    temperature: float = 1.0
    top_k: int = 0  # 0: off; like top_p and min_p it cuts the support that GVPO's optimum relies on
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: list[int] = field(default_factory=list)  # besides the model's own
    # Completions that the in-process sampler draws at a time, of all hosts; one that ends makes
    # room for another. null: all of a batch, where the short ones wait for the longest.
    slots: int | None = None
    # Of the keys and values that sampling keeps; "int8" takes a quarter of float32's memory. What
    # they round off, samples and their log-probs bear; the update computes its own.
    cache_dtype: Literal["model", "bfloat16", "int8"] = "model"
    demonstrations: int = 0  # how many of the k are texts from the column `solution`, not samples
    # Rollouts sampled ahead while the policy trains; they are that much staler. 0: none.
    lookahead: int = 0
    # Chips that share a copy of the weights, in model.dtype, while sampling; null: they stay cut as
    # for training, and every token of a completion collects them.
    tensor: int | None = None
    # What samples: this process, or servers that run elsewhere ("vllm-tpu" is vLLM without seeds).
    # The rest is for servers.
    engine: Literal["in_process", "vllm", "vllm-tpu", "sglang"] = "in_process"
    # Addresses, e.g. http://host:8000; a server can work for one run at a time.
    servers: list[str] = field(default_factory=list)
    # Folder for new weights, which every server sees under this path; null: `weights` in run.dir.
    weights_dir: str | None = None
    weights_dtype: Literal["float32", "bfloat16"] = "float32"  # of the files
    timeout: float = 600.0  # seconds that a request may take
    retries: int = 6  # tries of a request after the first
    concurrency: int = 64  # requests under way at each server, from each process
    # Nats a token by which a server's log-probs may differ from the trainer's, on average.
    logp_tolerance: float = 0.05
    api_key_env: str | None = None  # name of the environment variable that holds the servers' key


@dataclass(frozen=True)
class ReplayConfig:
    """What the policy sampled earlier, trained on again."""

    completions: int = 0  # how many of the k are older ones of the same prompt, once there are some
    groups: int = 0  # how many of an update's groups are whole older ones
    capacity: int = 1024  # groups remembered


@dataclass(frozen=True)
class RewardConfig:
    funcs: list[str] = field(default_factory=list)  # "module:function" or "path/file.py:function"
    weights: list[float] = field(default_factory=list)  # one per function; empty: all 1
    on_error: Literal["raise", "skip"] = "raise"  # "skip": leave the completion out, and count it


@dataclass(frozen=True)
class LossConfig:
    # gvpo, or one of those that it is compared with, see gvpo_jax/baselines.py.
    name: Literal[
        "gvpo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "reinforce_pp", "rebel", "dpo"
    ] = "gvpo"
    # Pull towards the reference, in reward per nat; the paper finds 0.01 to 0.5 fine. rebel: 1/eta.
    beta: float = 0.1
    huber_delta: float | None = None  # gvpo: residuals are clipped here, in units of reward
    epsilon: float | None = (
        None  # the baselines' clipping of probability ratios; null: as published
    )
    epsilon_high: float | None = None  # upper side; null: as published
    kl_coef: float = 0.0  # the baselines' KL penalty


@dataclass(frozen=True)
class ReferenceConfig:
    """The policy that beta pulls towards."""

    name: Literal["initial", "previous", "ema"] = "initial"
    refresh_every: int = 1  # previous: updates between refreshes, rounded up to a rollout
    decay: float = 0.99  # ema: per update


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0  # updates
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0  # null: no clipping


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100  # updates in all
    batch_size: int = 8  # prompts per update
    # Updates' worth of prompts that one rollout samples, all at once; rollout.slots bounds the
    # memory of their completions.
    steps_per_generation: int = 1
    num_iterations: int = 1  # passes over each rollout
    micro_batches: int = 1  # parts of whole groups per update, to save memory; same gradient
    # Parts that each group's completions are cut into, where a group is too large for memory: one
    # more forward pass, same gradient.
    completion_parts: int = 1
    packing: bool = True  # leave out, but for attention, what pads prompts and completions
    stop_at: int | None = None  # end this session after so many updates; the next start goes on


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # updates between evaluations; 0: only before and after
    num_generations: int = 4  # completions per held-out prompt
    temperature: float = 1.0
    batch_size: int = 16  # prompts
    success_reward: float = 1.0  # a completion with at least this reward counts as right


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50  # updates, rounded up to a rollout; the last state is always saved
    keep: int = 2


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = False  # needs the extra `tensorboard`
    completions_every: int = 10  # updates between samples written to disk
    samples: int = 3  # completions shown on screen each time


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, inside a slice and over slices (dcn); -1 takes what is left."""

    data: int = 1  # copies of everything
    fsdp: int = -1  # parameters, moments and batches are cut
    tensor: int = 1  # layers are cut
    dcn_data: int = -1
    dcn_fsdp: int = 1
    dcn_tensor: int = 1


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other, see gvpo_jax/parallel/distributed.py."""

    initialize: Literal["auto", "always", "never"] = "auto"
    coordinator_address: str | None = None  # HOST:PORT of process 0, with the next two
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 120  # seconds to wait for the others
    heartbeat_timeout: int = 100  # seconds after which a silent process counts as dead


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        check(self)


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
