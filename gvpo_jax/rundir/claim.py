"""A run's folder: claiming it for one config, and the files that are written whole."""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.config import Config, DistributedConfig
from gvpo_jax.config_file import difference, load_config, override, to_yaml
from gvpo_jax.errors import UserError
from gvpo_jax.rundir.files import read_metrics, write_jsonl, write_text

_LOCK = ".lock"


def claim(config: Config) -> Path:
    """The run folder, made and marked with the config, or found again with the same config in it.

    A run with a constant learning rate may be made longer: `train.steps` may grow.

    Raises:
        UserError: as for `check_claim`; nothing is written then.
    """
    folder = check_claim(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Where this session stops, and on which machines it runs, is not the run's business.
        config = dataclasses.replace(
            override(config, train__stop_at=None), distributed=DistributedConfig()
        )
        write_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def check_claim(config: Config) -> Path:
    """The run folder, nothing written yet.

    Raises:
        UserError: the folder holds something else, or a run of another config.
    """
    folder = Path(config.run.dir)
    try:
        if (folder / "config.yaml").is_file():
            _check_same(folder, load_config(folder / "config.yaml"), config)
        elif folder.exists() and (not folder.is_dir() or _is_foreign(folder)):
            raise UserError(f"{folder} exists and is not a run folder; choose another run.dir")
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


@contextlib.contextmanager
def lock(config: Config) -> Iterator[Path]:
    """The run folder, made where it is missing, held against other processes meanwhile.

    Raises:
        UserError: another process trains in the folder.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise _unusable(folder, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training in {folder}; wait for it, or choose another run.dir"
            ) from None
        yield folder


def check_not_lost(folder: Path, config: Config) -> None:
    """For a folder without any checkpoint: that starting anew destroys no results.

    Raises:
        UserError: the run got further than its checkpoints tell.
    """
    last = max((line["step"] for line in read_metrics(folder)), default=0)
    if (folder / "summary.json").exists() or last >= 2 * config.checkpoint.every:
        raise UserError(
            f"{folder} holds results up to step {last}, but its checkpoints are gone; "
            "choose another run.dir, or remove the folder to start anew"
        )


def _is_foreign(folder: Path) -> bool:
    ours = (_LOCK, "checkpoints", "weights")
    return any(entry.name not in ours for entry in folder.iterdir())


def _check_same(folder: Path, old: Config, new: Config) -> None:
    keys = difference(old, new)
    if keys and not (keys == ["train.steps"] and _may_grow(old, new)) and _has_begun(folder):
        raise UserError(
            f"{folder} holds a run with other settings ({', '.join(keys)}); "
            "give those, or choose another run.dir"
        )


def _has_begun(folder: Path) -> bool:
    """Whether there is an update or a checkpoint, and not just a start that failed."""
    checkpoints = folder / "checkpoints"
    saved = checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())
    return saved or any(line["step"] > 0 for line in read_metrics(folder))


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"can't use run.dir={folder}: {error.strerror or error}")


def _may_grow(old: Config, new: Config) -> bool:
    return new.optimizer.schedule == "constant" and new.train.steps > old.train.steps


def open_run(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder, overrides on top, with `run.dir` set to where it lies now.

    Raises:
        UserError: the folder is no run.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    return load_config(folder / "config.yaml", [*overrides, f"run.dir={folder}"])


def write_evaluation(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """eval/NAME.jsonl: one line per held-out completion."""
    write_jsonl(folder / "eval" / f"{name}.jsonl", records)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, the run in five numbers."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
