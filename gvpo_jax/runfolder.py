"""A run's folder: claiming it for one config, and the files that are written whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.config import Config, difference, load_config, to_yaml
from gvpo_jax.errors import UserError
from gvpo_jax.runfiles import write_jsonl, write_text


def claim(config: Config) -> Path:
    """The run folder, made and marked with the config, or found again with the same config in it.

    A run with a constant learning rate may be made longer: `train.steps` may grow.

    Raises:
        UserError: the folder holds something else, or a run of another config; nothing is written.
    """
    folder = Path(config.run.dir)
    try:
        return _claim(folder, config)
    except OSError as error:
        raise UserError(f"can't use run.dir={folder}: {error.strerror or error}") from None


def _claim(folder: Path, config: Config) -> Path:
    path = folder / "config.yaml"
    if path.is_file():
        keys = difference(load_config(path), config)
        if keys == ["train.steps"] and _may_grow(load_config(path), config):
            keys = []
        if keys:
            raise UserError(
                f"{folder} holds a run with other settings ({', '.join(keys)}); "
                "give those, or choose another run.dir"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a run folder; choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, to_yaml(config))
    return folder


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
