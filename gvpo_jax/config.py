"""A run's settings: the sections, each defined in the room that uses it, and what goes together.

`gvpo-jax train --help` and docs/settings.md list them all.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gvpo_jax.buckets import is_address
from gvpo_jax.collect.evaluate import EvalConfig
from gvpo_jax.collect.replay import ReplayConfig
from gvpo_jax.collect.sft import SftConfig
from gvpo_jax.data.hub import is_hub_name
from gvpo_jax.data.prompts import DataConfig
from gvpo_jax.data.reasoning_gym import TaskConfig as TaskConfig
from gvpo_jax.errors import Page, UserError
from gvpo_jax.installed import EXTRAS, has_extra
from gvpo_jax.models.config import ModelConfig
from gvpo_jax.parallel.distributed import DistributedConfig
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.rewards.load import RewardConfig
from gvpo_jax.rollout.engine import RolloutConfig
from gvpo_jax.rollout.servers.connect import ServersConfig
from gvpo_jax.rundir.claim import CheckpointConfig, RunConfig
from gvpo_jax.rundir.log import LogConfig
from gvpo_jax.rundir.trackers import PACKAGES
from gvpo_jax.settings import check_limits
from gvpo_jax.training.objectives import LossConfig
from gvpo_jax.training.optimizer import OptimizerConfig
from gvpo_jax.training.step import ReferenceConfig, TrainConfig

if TYPE_CHECKING:  # these bring in flax, which a misspelt config should not wait for
    from jax.sharding import Mesh
    from optax import GradientTransformation

    from gvpo_jax.models.decoder import DecoderFns
    from gvpo_jax.training.programs import Programs


@dataclass(frozen=True)
class Config:
    """All settings of a run; UserError where one is out of range, or some do not go together."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    servers: ServersConfig = field(default_factory=ServersConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    sft: SftConfig = field(default_factory=SftConfig)
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
        check_limits(self)
        self.data.day()
        self.model.check()
        self.eval.check()
        self.log.check()
        _check_loss(self)
        _check_sources(self)
        _check_streaming(self)
        _check_servers(self)
        if self.model.lora.rank is None and self.rollout.adapter != "merged":
            raise UserError(
                f"rollout.adapter={self.rollout.adapter} is for models with an adapter: give "
                "model.lora.rank, or leave it out"
            )
        train, rewards = self.train, self.rewards
        if train.batch_size % train.micro_batches:
            raise UserError(
                f"train.batch_size={train.batch_size} does not divide into "
                f"train.micro_batches={train.micro_batches}; use a multiple"
            )
        if train.steps is not None and train.epochs is not None:
            raise UserError(
                f"train.steps={train.steps} and train.epochs={train.epochs:g} are both given: "
                "leave one out, or set it to null"
            )
        if self.sft.on and is_address(self.run.dir):
            raise UserError(
                f"run.dir={self.run.dir}: a warm start (sft.steps, sft.epochs) needs a folder on "
                "this machine; or do it first, as a run of its own, with loss.name=sft"
            )
        if self.sft.steps is not None and self.sft.epochs is not None:
            raise UserError(
                f"sft.steps={self.sft.steps} and sft.epochs={self.sft.epochs:g} are both given: "
                "leave one out"
            )
        if rewards.weights and rewards.funcs and len(rewards.weights) != len(rewards.funcs):
            raise UserError(
                f"rewards.weights has {len(rewards.weights)} numbers for "
                f"{len(rewards.funcs)} functions"
            )

    @property
    def judges_rows(self) -> bool:
        """Whether there are held-out rows."""
        data = self.data
        return bool(data.eval_size and (self.eval.sets or data.eval_path or data.tasks))

    def programs(
        self,
        model: "DecoderFns",
        params: Any,
        mesh: "Mesh",
        optimizer: "GradientTransformation | None" = None,
    ) -> "Programs":
        """What a run compiles to train.

        params: those that are trained, or their shapes. optimizer: in place of the section's.
        """
        import jax

        from gvpo_jax.training.programs import make_programs

        shapes, tree = jax.tree.flatten(jax.eval_shape(lambda: params))
        changes = self.optimizer.schedule != "constant"
        return make_programs(
            model,
            tuple(shapes),
            tree,
            mesh,
            dtype=self.model.dtype,
            optimizer=optimizer or self.optimizer,
            updates=self.train.updates if changes else 0,
            loss=self.loss,
            max_completion_length=self.rollout.max_completion_length,
            micro_batches=self.train.micro_batches,
            completion_parts=self.train.completion_parts,
            averaged=self.reference.name == "ema",
        )


def _check_loss(c: Config) -> None:
    loss = c.loss
    if loss.huber_delta is not None and loss.name != "gvpo":
        raise UserError(f"loss.huber_delta is for gvpo, not for loss.name={loss.name}")
    clips = ("epsilon", "epsilon_high", "kl_coef")
    given = [f"loss.{name}" for name in clips if getattr(loss, name)]
    if loss.name == "sft":
        _check_sft(c, given)
        return
    if given and loss.name in ("gvpo", "rebel", "dpo"):
        raise UserError(
            f"loss.name={loss.name} has neither clipping nor a KL penalty: leave out "
            f"{', '.join(given)}; loss.beta is the pull towards the reference"
        )
    if loss.name in ("gvpo", "dpo"):
        return
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
    if c.rollout.repetition_penalty != 1:
        raise UserError(
            f"loss.name={loss.name} is right for samples of the policy itself: leave out "
            "rollout.repetition_penalty; gvpo takes any"
        )
    if c.rollout.params().cuts_support:
        raise UserError(
            f"loss.name={loss.name} is right for samples of the policy itself: leave out "
            "rollout.top_k, top_p and min_p"
        )


def _check_sft(c: Config, given: list[str]) -> None:
    sampling = ("data.groups_path", "rollout.demonstrations", "rollout.lookahead")
    sampling += ("replay.groups", "replay.completions", "sft.on")
    given = [*given, *(name for name in sampling if operator.attrgetter(name)(c))]
    if c.servers.kind != "none":
        given.append("servers.kind")
    if given:
        names = ", ".join("sft.steps or sft.epochs" if x == "sft.on" else x for x in given)
        raise UserError(
            f"loss.name=sft learns the texts in the column {c.sft.column!r}, and samples nothing: "
            f"leave out {names}"
        )


def _check_sources(c: Config) -> None:
    r = c.replay
    if "" in c.rollout.stop:
        raise UserError("rollout.stop holds an empty text, which is at the start of every one")
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
    names = ("rollout.demonstrations", "rollout.lookahead", "replay.completions", "replay.groups")
    useless = [name for name in names if operator.attrgetter(name)(c)]
    if c.data.groups_path and useless:
        raise UserError(
            f"{', '.join(useless)}: nothing is sampled with data.groups_path; leave it out"
        )


def _check_streaming(c: Config) -> None:
    if not c.data.streaming:
        if c.data.shuffle_buffer != DataConfig.shuffle_buffer:
            raise UserError("data.shuffle_buffer is for data.streaming=true; leave it out")
        return
    whole = ("data.groups_path", "data.tasks", "rollout.demonstrations", "replay.completions")
    given = [name for name in (*whole, "train.epochs", "sft.on") if operator.attrgetter(name)(c)]
    if c.loss.name == "sft":
        given.append("loss.name=sft")
    if given:
        names = ", ".join("sft.steps or sft.epochs" if x == "sft.on" else x for x in given)
        raise UserError(
            f"data.streaming does not know all rows beforehand, which {names} needs: leave out "
            "one of the two" + ("; train.steps says how long" if "train.epochs" in given else "")
        )


def _check_servers(c: Config) -> None:
    c.servers.check()
    if c.servers.kind == "none":
        return
    if is_address(c.run.dir) and c.servers.weights_dir is None:
        raise UserError(
            f"run.dir={c.run.dir}: servers read new weights from a folder; give "
            "servers.weights_dir, one that they and this machine see"
        )
    if c.model.quantization != "none":
        raise UserError(
            f"model.quantization={c.model.quantization} is for sampling in this process: the "
            f"weights of servers (servers.kind={c.servers.kind}) are not quantised so, and their "
            "log-probs differ"
        )
    for name, default in (("tensor", None), ("slots", None), ("cache_dtype", "model")):
        if getattr(c.rollout, name) != default:
            raise UserError(
                f"rollout.{name} is for sampling in this process, not on servers "
                f"(servers.kind={c.servers.kind}); leave it out"
            )
    if c.data.groups_path and not c.judges_rows:
        raise UserError(
            f"servers.kind={c.servers.kind}: nothing is sampled with data.groups_path and without "
            "held-out rows; leave it out"
        )


def check_extras(c: Config, *, unused: Sequence[str] = ()) -> None:
    """Raise UserError, naming all, where the config needs extras that are not installed.

    unused: extras that are not asked for.
    """
    of_sets = [each.path for each in c.eval.sets]
    files = [c.data.path, c.data.eval_path, *of_sets, c.data.groups_path]
    paths = *files, c.run.dir, c.model.name, c.model.adapter, *c.rewards.funcs
    funcs = " ".join([*c.rewards.funcs, c.eval.checker or ""])
    tasks = bool(c.data.tasks) or "gvpo_jax.rewards.reasoning_gym:" in funcs
    needed = {
        "gguf": c.model.name.endswith(".gguf"),
        "gcs": any(str(path).startswith("gs://") for path in paths),
        "tasks": tasks,
        "math": "gvpo_jax.rewards.math:" in funcs,
        "qlora": c.model.quantization != "none",
        "servers": c.servers.kind != "none",
        "hub": any(is_hub_name(file) for file in files[:-1] if file),
        "parquet": any(file and file.endswith(".parquet") for file in files),
        **{name: name in c.log.all_trackers() for name in PACKAGES},
    }
    missing = {
        extra: EXTRAS[extra][0]
        for extra, wanted in needed.items()
        if wanted and extra not in unused and not has_extra(extra)
    }
    if "hub" in missing:
        file = next(file for file in files[:-1] if file and is_hub_name(file))
        raise UserError(
            f"{file} is neither a file nor a folder here; if it is a dataset of the hub: "
            f'pip install "gvpo-jax[{",".join(missing)}]"',
            page=Page.EXTRAS,
        )
    if missing:
        raise UserError(
            f"this config needs what is not installed ({', '.join(missing.values())}): "
            f'pip install "gvpo-jax[{",".join(missing)}]"',
            page=Page.EXTRAS,
        )
