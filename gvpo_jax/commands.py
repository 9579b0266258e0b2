"""The commands: whole runs from a config, their evaluation and export.

All raise `UserError` for the user's mistakes.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gvpo_jax.collect.evaluate import EvalConfig
from gvpo_jax.collect.replay import ReplayConfig
from gvpo_jax.config import Config, check_extras
from gvpo_jax.config_file import WARM_START, check_claim, override, servers_of
from gvpo_jax.config_values import shown
from gvpo_jax.data.eval_sets import load_eval_sets
from gvpo_jax.data.rows import Row, columns_of
from gvpo_jax.data.stream import RowStream
from gvpo_jax.errors import Page, UserError, tell
from gvpo_jax.models.upload import check_repository
from gvpo_jax.parallel.distributed import from_first_host, is_first, raise_together
from gvpo_jax.parallel.lost_host import call_witness
from gvpo_jax.parallel.mesh import all_devices
from gvpo_jax.rewards import batched
from gvpo_jax.rewards.functions import check_columns
from gvpo_jax.rewards.load import RewardConfig, load_function
from gvpo_jax.rewards.trust import remember
from gvpo_jax.rollout.engine import RolloutConfig
from gvpo_jax.rollout.servers.connect import ServersConfig
from gvpo_jax.rundir import bucket
from gvpo_jax.rundir.claim import clear, has_begun, lock, write_evaluation
from gvpo_jax.rundir.files import read_scores, write_text
from gvpo_jax.rundir.trackers import PACKAGES
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.checkpoint import Checkpoints
from gvpo_jax.training.objectives import LossConfig
from gvpo_jax.training.step import ReferenceConfig


def train(config: Config) -> dict[str, Any]:
    """Train as the config says; returns the summary. Its mistakes show before a model is loaded."""
    check_extras(config)
    _join(config)
    asked, (config, first) = config, warm_started(config)
    offline = config.data.groups_path is not None or config.loss.name == "sft"

    def prepare():
        needed = not offline or config.rewards.funcs
        reward_funcs = config.rewards.functions() if needed else []
        rows, held_out = _rows(config)
        columns = columns_of(rows.head() if isinstance(rows, RowStream) else rows)
        check_claim(config)
        funcs = [batched(func) for func in reward_funcs]
        if not offline:
            check_columns(funcs, columns, "the training data")
        if held_out:
            check_columns(funcs, columns_of(held_out), "the held-out data")
        if held_out and config.eval.checker:
            checker = batched(load_function(config.eval.checker, "eval.checker"))
            check_columns([checker], columns_of(held_out), "the held-out data", kind="checker")
        if held_out and not reward_funcs:
            raise UserError(
                "held-out rows need reward functions: name some in rewards.funcs, or give "
                "data.eval_size=0"
            )
        others = config.data.filter, config.eval.checker
        served = servers_of(config) if config.servers.kind != "none" else []
        remember([*config.rewards.funcs, *(spec for spec in others if spec), *served])
        return reward_funcs, rows, held_out

    reward_funcs, rows, held_out = raise_together(prepare)
    if first:
        _warm_start(asked, first, rows)
    if is_first():
        tell(f"loading {config.model.name}")
    trainer = Trainer(config)
    if offline:
        return trainer.train_offline(rows, reward_funcs=reward_funcs, eval_dataset=held_out)
    return trainer.train(rows, reward_funcs, eval_dataset=held_out)


def warm_started(config: Config) -> tuple[Config, Config | None]:
    """The run from its warm start's result on, and the warm start as a run of its own, if any."""
    sft, data, rollout = config.sft, config.data, config.rollout
    if not sft.on:
        return config, None
    folder = str(config.run.folder.absolute())
    first = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=f"{folder}/sft"),
        data=dataclasses.replace(data, eval_path=None, eval_size=0, groups_path=None),
        # What samples and judges may be changed until the run itself has begun.
        rollout=RolloutConfig(max_completion_length=rollout.max_completion_length),
        servers=ServersConfig(),
        replay=ReplayConfig(),
        rewards=RewardConfig(),
        sft=dataclasses.replace(sft, steps=None, epochs=None),
        loss=LossConfig(name="sft"),
        reference=ReferenceConfig(),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=sft.learning_rate, warmup_steps=0
        ),
        train=dataclasses.replace(
            config.train,
            steps=sft.steps,
            epochs=sft.epochs,
            batch_size=sft.batch_size or config.train.batch_size,
            num_iterations=1,
            steps_per_generation=1,
            stop_at=None,
        ),
        eval=EvalConfig(),
    )
    lora = config.model.lora.rank is not None
    start = {"model__adapter" if lora else "model__name": f"{folder}/{WARM_START}"}
    return override(config, sft__steps=None, sft__epochs=None, **start), first


def _warm_start(config: Config, first: Config, rows: list[Row] | RowStream) -> None:
    """Supervised fine-tuning, whose result is written beside it, if that is not done yet.

    What is done is used again for the same rows and model alone: until the run has begun, whose
    checkpoints know them too, the warm start's own checkpoint is asked.
    """
    folder = config.run.folder.absolute()
    done, asked = folder / WARM_START, folder / "sft" / "asked.json"
    wanted = {"steps": config.sft.steps, "epochs": config.sft.epochs}

    def begin() -> bool:
        """Whether there is anything to do."""
        if config.run.overwrite:
            with lock(config.run.dir):
                clear(config.run.dir)
                asked.unlink(missing_ok=True)
                shutil.rmtree(done, ignore_errors=True)
        if not asked.exists():
            return True
        there = json.loads(asked.read_text())
        for name, value in wanted.items():
            if there.get(name) != value:
                raise UserError(
                    f"{folder} began with a warm start of sft.{name}={shown(there.get(name))}: "
                    "give that, or choose another run.dir, or start over with run.overwrite=true"
                )
        return not has_begun(config.run.dir)

    if not from_first_host(begin):
        return
    if is_first():
        tell(f"warm start: supervised fine-tuning on {first.sft.column!r}, in {first.run.dir}")
    trainer = Trainer(first)
    trainer.train_offline(rows)
    if not from_first_host(asked.exists):
        lora = first.model.lora.rank is not None
        (trainer.save_adapter if lora else trainer.save_pretrained)(done)
        from_first_host(lambda: write_text(asked, json.dumps(wanted) + "\n"))


def evaluate(
    config: Config, *, checkpoint: bool, step: int | Literal["best"] | None = None
) -> dict[str, float]:
    """Held-out scores of the model that a config starts from, or of its run's last checkpoint.

    checkpoint: the latter, whose answers are kept as eval/latest.jsonl.
    step: of another checkpoint.
    """
    check_extras(config, unused=list(PACKAGES))
    _join(config)
    reward_funcs = _judges(config)
    held_out = _held_out(config, _filter(config))
    if not held_out:
        raise UserError(
            "there are no held-out rows: give eval.sets, data.eval_path or data.tasks, and "
            "data.eval_size"
        )
    trainer = Trainer(config, trains=False)
    with contextlib.closing(trainer.engine), contextlib.ExitStack() as stack:
        if checkpoint:
            if config.servers.kind != "none":
                from_first_host(lambda: _hold_servers(config, stack))
            trainer.restore(config.run.dir, step=step)
        metrics, records = trainer.evaluate(held_out, reward_funcs)
    if checkpoint and is_first():
        try:
            write_evaluation(config.run.folder, "latest", records)
            bucket.push(config.run.dir, only="eval/latest.jsonl")
        except UserError as error:  # the scores are there all the same
            tell(f"gvpo-jax: {error}; the answers are not kept", error=True)
    return metrics


def inspect(config: Config) -> tuple[str, bool]:
    """A run's checkpoints as a person reads them, and whether all are whole."""
    broken: dict[int, str] = {}
    lines = ["  step      on disk   score  checkpoint"]
    if config.run.checkpoints.is_dir():
        with Checkpoints(config.run.checkpoints, read_only=True) as checkpoints:
            scores = read_scores(config.run.folder)
            for step in checkpoints.steps():
                broken[step] = checkpoints.problem(step)
                size = f"{checkpoints.size(step) / 2**30:.3f} GiB"
                score = f"{scores[step]:.3f}" if step in scores else ""
                lines.append(f"{step:>6}  {size:>11}  {score:>6}  {broken[step] or 'whole'}")
    saved = max((step for step, problem in broken.items() if not problem), default=0)
    head = f"{config.run.dir}: {saved} of {config.train.updates} updates are saved"
    return "\n".join([head, *lines] if broken else [head]), not any(broken.values())


def export(config: Config, folder: Path, step: int | Literal["best"] | None = None) -> Path:
    """Write a run's checkpoint, by default the last, as a model folder that transformers loads."""
    _at_checkpoint(config, step).save_pretrained(folder)
    return folder


def export_adapter(config: Config, folder: Path, step: int | Literal["best"] | None = None) -> Path:
    """Write the adapter of a run's checkpoint, by default the last, as a folder for PEFT."""
    _check_adapter(config)
    _at_checkpoint(config, step).save_adapter(folder)
    return folder


def push(
    config: Config,
    folder: Path,
    name: str,
    *,
    step: int | Literal["best"] | None = None,
    adapter: bool = False,
    private: bool | None = None,
) -> str:
    """Write a run's checkpoint as above, and send it to the hub; gives its address there."""
    check_repository(name)
    if adapter:
        _check_adapter(config)
    trainer = _at_checkpoint(config, step)
    return trainer.push_to_hub(name, folder, adapter=adapter, private=private)


def _judges(config: Config) -> list[Any]:
    """The reward functions, or `eval.checker` where none is named and nothing is trained."""
    if config.eval.checker and not config.rewards.funcs:
        return [load_function(config.eval.checker, "eval.checker")]
    if config.eval.sets and not config.rewards.funcs:
        raise UserError(
            "eval.sets: nothing says which answers are right; name a function in eval.checker or "
            "rewards.funcs, e.g. gvpo_jax.rewards.math:math_verify",
            page=Page.EVALUATION,
        )
    return config.rewards.functions()


def _rows(config: Config) -> tuple[list[Row] | RowStream, list[Row]]:
    """Training rows and held-out rows."""
    keep = _filter(config)
    if config.data.streaming:
        return RowStream(lambda: config.data.read_training(keep)), _held_out(config, keep)
    rows = config.data.load_training(config.run.seed, keep)
    held_out = _held_out(config, keep)
    if keep is not None and is_first():
        text = f"data.filter leaves {len(rows)} rows"
        text += f", and {len(held_out)} held-out ones" if held_out else ""
        tell(text, error=True)  # the standard output of eval is JSON
    return rows, held_out


def _check_adapter(config: Config) -> None:
    if config.model.lora.rank is None:
        raise UserError(
            f"--adapter: the run in {config.run.dir} trains the whole model, without an adapter; "
            "leave --adapter out"
        )


def _filter(config: Config) -> Callable[[Row], Any] | None:
    spec = config.data.filter
    return None if spec is None else load_function(spec, "data.filter")


def _held_out(config: Config, keep: Callable[[Row], Any] | None) -> list[Row]:
    """Those of `eval.sets`, or else of the section `data`."""
    if not config.eval.sets:
        return config.data.load_held_out(keep)
    return load_eval_sets(config.eval.sets) if config.data.eval_size else []


def _at_checkpoint(config: Config, step: int | Literal["best"] | None) -> Trainer:
    unsampled = dataclasses.replace(config, servers=ServersConfig())
    trainer = Trainer(unsampled, trains=False)
    trainer.restore(config.run.dir, step=step)
    return trainer


def _hold_servers(config: Config, stack: contextlib.ExitStack) -> None:
    """See that no training in this run's folder has other weights on the servers meanwhile."""
    try:
        stack.enter_context(lock(config.run.dir))
    except UserError as error:
        raise UserError(f"{error}; or sample here: servers.kind=none 'servers.urls=[]'") from None


def _join(config: Config) -> None:
    """Start as one of the run's processes; before anything asks for devices."""
    config.distributed.start()
    all_devices()
    call_witness()
