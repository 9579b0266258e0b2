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
        UserError: as for `check_claim`; nothing is written then.
    """
    folder = check_claim(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not a run folder; choose another run.dir")
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def _check_same(folder: Path, old: Config, new: Config) -> None:
    keys = difference(old, new)
    if keys and not (keys == ["train.steps"] and _may_grow(old, new)):
        raise UserError(
            f"{folder} holds a run with other settings ({', '.join(keys)}); "
            "give those, or choose another run.dir"
        )


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
