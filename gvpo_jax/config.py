"""A run's settings: frozen dataclasses whose comments are the manual, from YAML and `key=value`."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from gvpo_jax.config_check import check
from gvpo_jax.errors import UserError

CONFIGS = Path(__file__).parent / "configs"  # where the wheel carries the files of configs/


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
    groups_path: str | None = None  # ... groups sampled elsewhere, see gvpo_jax/offline.py
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
    """How the processes of a run find each other, see gvpo_jax/distributed.py."""

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


# A resumed run may change these: they touch neither what was computed nor what will be.
_FREE = (
    "run.dir",
    "run.compilation_cache",
    "model.attention",
    "model.remat",
    "rollout.tensor",
    "rollout.servers",
    "rollout.weights_dir",
    "rollout.timeout",
    "rollout.retries",
    "rollout.concurrency",
    "rollout.logp_tolerance",
    "rollout.api_key_env",
    "train.packing",
    "train.stop_at",
    "checkpoint",
    "log",
    "eval.batch_size",
    "mesh",
    "distributed",
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `key=value` overrides on top.

    Data files that are not found from the working directory are looked for beside the config. A
    path that does not exist but names a config that came with the package (`quickstart`,
    `configs/quickstart.yaml`) is taken from there.

    Raises:
        UserError: no such file, no YAML, an unknown key, or a value out of range.
    """
    file = _find(Path(path))
    given = [_parse_override(override) for override in overrides]
    try:
        schema = OmegaConf.structured(Config)
        merged = OmegaConf.merge(schema, OmegaConf.load(file), *given)
        config = _as_config(merged)
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{path} is not a readable YAML config:{line} {error.problem}") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable YAML config: {_one_line(error)}") from None
    data = dataclasses.replace(
        config.data,
        path=_beside(file, config.data.path),
        eval_path=_beside(file, config.data.eval_path),
        groups_path=_beside(file, config.data.groups_path),
    )
    return dataclasses.replace(config, data=data)


def override(config: Config, **values: Any) -> Config:
    """A copy with `section__key=value` changed, e.g. `override(config, loss__beta=0.2)`.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition("__")
        changes.setdefault(section, {})[key] = value
    try:
        return _as_config(OmegaConf.merge(OmegaConf.structured(config), changes))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None


def to_yaml(config: Config) -> str:
    """The whole config, resolved, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def difference(a: Config, b: Config) -> list[str]:
    """Keys, as `section.key`, in which two configs differ in a way that a resumed run must not."""
    flat_a, flat_b = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    return [
        key
        for key in flat_a
        if flat_a[key] != flat_b.get(key)
        and not any(key == f or key.startswith(f + ".") for f in _FREE)
    ]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a config file")
    name = path.name if path.suffix else f"{path.name}.yaml"
    for folder in (CONFIGS, CONFIGS.parent.parent / "configs"):
        if path.parent in (Path(), Path("configs")) and (folder / name).is_file():
            return folder / name
    raise UserError(f"there is no config file {path}")


def _parse_override(override: str) -> Any:
    try:
        if "=" in override:
            return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, YAMLError):
        pass
    raise UserError(f"'{override}' is not an override: write key=value, e.g. train.steps=10")


def _beside(file: Path, path: str | None) -> str | None:
    """A relative path, looked for from here and then beside the config, made absolute."""
    if path is None:
        return None
    places = (Path(path), file.parent / path)
    return next((str(place.absolute()) for place in places if place.exists()), path)


def _as_config(merged: Any) -> Config:
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


_RECORDS = {
    record.__name__: record
    for record in (Config, TaskConfig, *(type(getattr(Config(), f.name)) for f in fields(Config)))
}


def _one_line(error: Exception) -> str:
    """OmegaConf's first sentence and the key it is about, without the lines on its own types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next(
        (line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), ""
    )
    message = lines[0] if lines else type(error).__name__
    if "is not a ListConfig" in message:
        message = "needs a list, e.g. [a, b]"
    if "incompatible container types" in message:
        message = "a list stands where a mapping belongs, or the reverse: sections are mappings, "
        message += "data.tasks and rewards.funcs are lists, with a dash before each entry"
    if (stranger := re.fullmatch(r"Key '.*' not in '(\w+)'", message)) and stranger[1] in _RECORDS:
        known = ", ".join(f.name for f in fields(_RECORDS[stranger[1]]))
        message += f", which has {known}"
    return f"{key}: {message}" if key and key not in message else message
