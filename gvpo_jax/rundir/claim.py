"""A run's folder: holding it against others, and the files that are written whole."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from gvpo_jax.buckets import as_path, is_address, remove
from gvpo_jax.errors import UserError
from gvpo_jax.rundir.bucket import Hold, entries, local
from gvpo_jax.rundir.files import read_metrics, write_jsonl
from gvpo_jax.settings import setting

SETTINGS = "config.yaml"
_LOCK = ".lock"
# What `clear` removes; not the settings, without which the folder would be no run's.
_WRITTEN = (
    *("checkpoints", "completions", "eval", "tensorboard", "profile", "weights"),
    *("metrics.jsonl", "summary.json", "report.html"),
)


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, and what holds for all of the run."""

    dir: str = setting(
        "runs/run",
        "Holds everything the run writes; a second start on it resumes. gs://bucket/folder too.",
        free=True,
        path="run",
    )
    overwrite: bool = setting(
        False,
        "Start over: what a run in the folder left is replaced, all but its export.",
        free=True,
    )
    seed: int = setting(0, "Of data order and sampling.", least=0, most=2**31 - 1)
    compilation_cache: str | None = setting(
        "~/.cache/gvpo-jax",
        "Where compiled programs are kept for the next start, on each machine; null: nowhere. "
        "JAX_COMPILATION_CACHE_DIR goes first.",
        free=True,
    )

    @property
    def folder(self) -> Path:
        """Where the run's files are on this machine, see `gvpo_jax.rundir.bucket`."""
        return local(self.dir)

    @property
    def checkpoints(self) -> epath.Path:
        """Where they lie: on this machine, or in the bucket."""
        return as_path(self.dir) / "checkpoints"

    def keep_compiled(self) -> None:
        """Let JAX keep what it compiles, unless it was told a place already."""
        if self.compilation_cache and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
            folder = Path(self.compilation_cache).expanduser()
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                return  # JAX would warn at every program
            jax.config.update("jax_compilation_cache_dir", str(folder))
            compilation_cache.reset_cache()  # JAX has asked once, if anything was compiled before


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = setting(
        50, "Updates, rounded up to a rollout; the last state is always saved.", least=1, free=True
    )
    keep: int = setting(2, "Latest checkpoints that stay.", least=1, free=True)
    keep_best: int = setting(
        0,
        "Checkpoints that stay besides: those with the best held-out accuracy, or reward. A step "
        "that is both evaluated and saved has one, see eval.every.",
        least=0,
        free=True,
    )


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turns what the system says about a run folder into a line for the user."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(folder)) else ""
        reason = f"{error.strerror or error}{where}"
        raise UserError(f"can't use run.dir={folder}: {reason}") from None


def check_name(run_dir: str) -> None:
    """Raise UserError where Orbax writes checkpoints that it can't read again."""
    path = run_dir if is_address(run_dir) else str(Path(run_dir).absolute())
    if bad := sorted(set("[]\\") & set(path)):
        raise UserError(
            f"run.dir={path}: Orbax can't read checkpoints from a folder with {' or '.join(bad)} "
            "in its path; choose another run.dir"
        )


def check_not_foreign(run_dir: str) -> None:
    """Raise UserError where a folder without settings holds what is no run's, or is no folder."""
    ours = {_LOCK, "checkpoints", "weights", "sft"}
    file = not is_address(run_dir) and Path(run_dir).is_file()
    if file or not ours.issuperset(entries(run_dir)):
        raise UserError(f"{run_dir} exists and is not a run folder; choose another run.dir")


def clear(run_dir: str | Path) -> None:
    """Remove what a run writes, and nothing else: the folder may hold a user's files too."""
    for name in _WRITTEN:
        if is_address(run_dir):
            remove(f"{run_dir}/{name}")
        path = local(run_dir) / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def has_begun(run_dir: str) -> bool:
    """Whether there is an update or a checkpoint, and not just a start that failed."""
    saved = any(name.isdigit() for name in entries(f"{run_dir}/checkpoints"))
    return saved or any(line["step"] > 0 for line in read_metrics(local(run_dir)))


@contextlib.contextmanager
def lock(run_dir: str | Path) -> Iterator[Callable[[], None]]:
    """The run folder, made where it is missing, held against other processes meanwhile.

    Gives a function that raises UserError where it is not held any more, see `Hold.check`.

    Raises:
        UserError: another process trains in the folder, or it can't be used.
    """
    folder = local(run_dir)
    with usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = filelock.FileLock(folder / _LOCK, timeout=0).acquire()
        except filelock.Timeout:
            raise UserError(
                f"another process is training in {run_dir}; wait for it, or choose another run.dir"
            ) from None
    with held:
        if is_address(run_dir):
            with Hold(str(run_dir)) as there:
                yield there.check
        else:
            yield lambda: None


def check_not_lost(run_dir: str, first_save: int) -> int:
    """The last update that a run without checkpoints did, which starting anew does again.

    Args:
        run_dir: the run's folder, or its address.
        first_save: the update behind which its first checkpoint was begun.

    Raises:
        UserError: the run got so far that it must have had a checkpoint. Starting anew would
            destroy its results.
    """
    folder = local(run_dir)
    last = max((line["step"] for line in read_metrics(folder)), default=0)
    # It is written in the background. The second one, as many updates later, waits until it is.
    if (folder / "summary.json").exists() or last > 2 * first_save:
        raise UserError(
            f"{run_dir} holds results up to step {last}, but its checkpoints are gone; "
            "choose another run.dir, or remove the folder to start anew"
        )
    return last


def write_evaluation(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """eval/NAME.jsonl: one line per held-out completion."""
    write_jsonl(folder / "eval" / f"{name}.jsonl", records)
