"""The files of a run folder: their names, how they are written whole, and how they are read back.

runs/NAME/config.yaml          the resolved settings
runs/NAME/metrics.jsonl        one JSON object a line, each with "step"
runs/NAME/completions/         step_000010.jsonl: what was sampled, with rewards
runs/NAME/eval/                before.jsonl, step_000020.jsonl, after.jsonl: held-out answers
runs/NAME/summary.json         written at the end
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gvpo_jax.data.fingerprints import stable_text
from gvpo_jax.errors import UserError

METRICS = "metrics.jsonl"
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # as `write_text` names them
_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class Evaluation:
    """Held-out answers of one moment of a run; label: "before", "step 20" or "after"."""

    label: str
    step: int
    rows: list[dict[str, Any]]


def step_files(folder: Path) -> dict[int, Path]:
    """The step_*.jsonl files of a folder by step, in order; empty where there is no folder."""
    found = ((_STEP_FILE.fullmatch(path.name), path) for path in folder.glob("step_*.jsonl"))
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_file()))


def to_json(value: Any) -> str:
    """One line of strict JSON: NaN and infinities become null, arrays lists, other objects text."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: through a neighbour that is synced and renamed.

    Raises:
        UserError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate becomes \udc80, which is JSON's own escape for it.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"can't write {path}: {error.strerror or error}") from None


def sweep_temporary(run_dir: Path) -> None:
    """Remove what killed writers of `write_text` left; only for the one that writes there."""
    for folder in (run_dir, run_dir / "completions", run_dir / "eval"):
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, [] without one; a last line torn by a crash is left out.

    Raises:
        UserError: an earlier line is not a JSON object; names file and line.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows = [(number, _parse(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in rows[:-1]:
        if row is None:
            raise UserError(f"{path}:{number} is not a JSON object; mend or delete that line")
    return [row for _, row in rows if row is not None]


def read_history(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics, as they were before JSON made null of NaN."""
    rows = read_jsonl(Path(run_dir) / METRICS)
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The metrics of a run, one dict per step in order; of lines of one step the later one wins."""
    steps: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(Path(run_dir) / METRICS):
        if isinstance(row.get("step"), int):
            steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def read_scores(run_dir: Path) -> dict[int, float]:
    """The held-out accuracy by step, or reward where there is none; a later line counts."""
    scores = {}
    for row in read_history(run_dir):
        score = row.get("eval/accuracy", row.get("eval/reward"))
        if isinstance(score, float | int) and not math.isnan(score):
            scores[row["step"]] = float(score)
    return scores


def read_evaluations(run_dir: Path, last_step: int) -> list[Evaluation]:
    """Held-out answers by step; `after` is taken to be at `last_step`."""
    folder = run_dir / "eval"
    files = [("before", 0, folder / "before.jsonl")]
    files += [(f"step {step}", step, path) for step, path in step_files(folder).items()]
    files += [("after", last_step, folder / "after.jsonl")]
    found = [Evaluation(label, step, read_jsonl(path)) for label, step, path in files]
    return sorted((e for e in found if e.rows), key=lambda e: e.step)


def read_latest_completions(run_dir: Path) -> tuple[int, list[dict[str, Any]]]:
    """Step and rows of the newest completions file that has rows; (0, []) without one."""
    for step, path in reversed(step_files(run_dir / "completions").items()):
        if rows := read_jsonl(path):
            return step, rows
    return 0, []


def read_settings(run_dir: Path) -> dict[str, Any]:
    """config.yaml as nested dicts; {} without one, its text under one key if it is no mapping."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        # A run writes no aliases: a few lines of them could stand for more than memory holds.
        aliased = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        settings = None if aliased else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        settings = None
    return settings if isinstance(settings, dict) else {"config.yaml": text}


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json; {} where the run has not finished or the file is torn."""
    path = run_dir / "summary.json"
    return (_parse(path.read_bytes()) or {}) if path.is_file() else {}


def check_run(run_dir: Path) -> None:
    """Raise UserError where a folder holds no run."""
    if not run_dir.is_dir():
        raise UserError(f"there is no folder {run_dir}; give a run's folder, such as runs/NAME")
    if not (run_dir / "config.yaml").exists() and not (run_dir / METRICS).exists():
        raise UserError(
            f"{run_dir} is not a run: it has neither config.yaml nor {METRICS};"
            " give the folder that training wrote, such as runs/NAME"
        )
    config = run_dir / "config.yaml"
    by_hand = config.is_file() and config.read_bytes().lstrip()[:1] == b"#"  # no run writes any
    if by_hand and not (run_dir / METRICS).exists():
        raise UserError(
            f"{run_dir} is not a run: its config.yaml was written by hand; train it, then give its "
            "run.dir"
        )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else stable_text(value)
