"""Whole runs from a config: data and reward functions are found, the trainer does the rest."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gvpo_jax.config import Config
from gvpo_jax.data.reasoning_gym import TaskSpec, reasoning_gym_rows
from gvpo_jax.data.rows import load_rows
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import is_first, raise_together, start
from gvpo_jax.rewards import load_reward_func
from gvpo_jax.rundir.claim import check_claim, lock, write_evaluation
from gvpo_jax.trainer import Trainer

Row = dict[str, Any]


def train(config: Config) -> dict[str, Any]:
    """Train as the config says; returns the summary. Its mistakes show before a model is loaded."""
    _join(config)
    offline = config.data.groups_path is not None

    def prepare():
        reward_funcs = [] if offline and not config.rewards.funcs else _reward_funcs(config)
        rows, held_out = load_data(config)
        check_claim(config)
        if held_out and not reward_funcs:
            raise UserError(
                "held-out rows need reward functions: name some in rewards.funcs, or give "
                "data.eval_size=0"
            )
        return reward_funcs, rows, held_out

    reward_funcs, rows, held_out = raise_together(prepare)
    if is_first():
        print(f"loading {config.model.name}", flush=True)
    trainer = Trainer(config)
    if offline:
        return trainer.train_offline(rows, reward_funcs=reward_funcs, eval_dataset=held_out)
    return trainer.train(rows, reward_funcs, eval_dataset=held_out)


def evaluate_model(config: Config) -> dict[str, float]:
    """Held-out accuracy of the model that a config starts from."""
    return _evaluate(config, lambda trainer: None)[0]


def evaluate_run(config: Config) -> dict[str, float]:
    """Held-out accuracy of a run's last checkpoint, kept as eval/latest.jsonl."""
    with contextlib.ExitStack() as stack:

        def prepare(trainer: Trainer) -> None:
            raise_together(lambda: _hold_servers(config, stack))
            trainer.restore(config.run.dir)

        metrics, records = _evaluate(config, prepare)
    if is_first():
        write_evaluation(Path(config.run.dir), "latest", records)
    return metrics


def _evaluate(config: Config, prepare: Callable[[Trainer], Any]):
    _join(config)
    reward_funcs = _reward_funcs(config)
    _, held_out = load_data(config)
    if not held_out:
        raise UserError(
            "there are no held-out rows: give data.tasks or data.eval_path, and data.eval_size"
        )
    trainer = Trainer(config)
    prepare(trainer)
    with contextlib.closing(trainer.policy):
        return trainer.evaluate(held_out, reward_funcs)


def export(config: Config, folder: Path) -> Path:
    """Write a run's last checkpoint as a model folder that transformers loads."""
    trainer = Trainer(config)
    trainer.restore(config.run.dir)
    trainer.save_pretrained(folder)
    return folder


def load_data(config: Config) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, from files or from generated tasks.

    Raises:
        UserError: none or several are given, or what reading them raises.
    """
    d = config.data
    tasks = [TaskSpec(t.name, t.settings, t.question, t.answer_prefix, t.weight) for t in d.tasks]
    # Beside given groups, tasks are there for the held-out rows alone.
    if [bool(d.path), bool(d.groups_path), bool(tasks) and not d.groups_path].count(True) != 1:
        raise UserError("give one of data.path, data.groups_path and data.tasks")
    if path := d.path or d.groups_path:
        rows = load_rows(path)
    else:
        rows = reasoning_gym_rows(tasks, size=d.train_size, seed=config.run.seed, split="train")
    if d.eval_path and d.eval_size:
        return rows, load_rows(d.eval_path)[: d.eval_size]
    if tasks and d.eval_size:
        return rows, reasoning_gym_rows(tasks, size=d.eval_size, seed=d.eval_seed, split="eval")
    return rows, []


def _hold_servers(config: Config, stack: contextlib.ExitStack) -> None:
    """See that no training in this run's folder has other weights on the servers meanwhile."""
    if is_first() and config.rollout.engine != "in_process":
        try:
            stack.enter_context(lock(config))
        except UserError as error:
            raise UserError(
                f"{error}; or sample here: rollout.engine=in_process 'rollout.servers=[]'"
            ) from None


def _join(config: Config) -> None:
    """Start as one of the run's processes; before anything asks for devices."""
    d = config.distributed
    start(
        initialize=d.initialize,
        coordinator_address=d.coordinator_address,
        num_processes=d.num_processes,
        process_id=d.process_id,
        initialization_timeout=d.initialization_timeout,
        heartbeat_timeout=d.heartbeat_timeout,
    )
    cache = "jax_compilation_cache_dir"
    if config.run.compilation_cache and getattr(jax.config, cache) is None:
        jax.config.update(cache, str(Path(config.run.compilation_cache).expanduser()))


def _reward_funcs(config: Config) -> list[Callable[..., Any]]:
    if not config.rewards.funcs:
        raise UserError("rewards.funcs is empty: name at least one, e.g. [my_rewards.py:correct]")
    return [load_reward_func(spec) for spec in config.rewards.funcs]
