"""The files that `gvpo-jax init` writes: a config, a reward and rows to start with."""

import contextlib
import os
import shlex
from pathlib import Path

from gvpo_jax.buckets import is_address
from gvpo_jax.errors import UserError
from gvpo_jax.installed import PACKAGED

FILES = {
    "config.yaml": "the settings, each with a comment",
    "rewards.py": "the reward: what is a good answer",
    "rows.jsonl": "ten rows to train on",
    "held_out.jsonl": "rows to judge the model by",
}


def write_starter(folder: str | Path) -> list[Path]:
    """Write the starter files into a folder, which is made if it is not there.

    Returns:
        The files.

    Raises:
        UserError: one of them is there already, or none can be written; then nothing is written.
    """
    if is_address(folder):
        raise UserError(f"{folder} is an address: give a folder on this machine")
    target = Path(folder).expanduser()
    contents = {target / name: _template(name) for name in FILES}
    there = [file.name for file in contents if os.path.lexists(file)]
    if there:
        raise UserError(
            f"{folder} has {', '.join(there)} already, and nothing is replaced: give another "
            f"folder, e.g. gvpo-jax init {target.name}-2"
        )
    with contextlib.ExitStack() as undo:
        try:
            made = [path for path in (target, *target.parents) if not os.path.lexists(path)]
            target.mkdir(parents=True, exist_ok=True)
            for path in reversed(made):
                undo.callback(path.rmdir)
            for file, content in contents.items():
                with file.open("xb") as opened:
                    undo.callback(file.unlink)
                    opened.write(content)
        except OSError as error:
            raise UserError(f"can't write to {folder}: {error.strerror or error}") from None
        undo.pop_all()  # all is well: it stays
    return list(contents)


def next_steps(written: list[Path]) -> str:
    """What was written and what to do with it, as a person reads it."""
    config = shlex.quote(str(written[0]))
    width = max(len(str(file)) for file in written)
    return "\n".join(
        [
            *(f"wrote {file!s:<{width}}  {FILES[file.name]}" for file in written),
            "",
            "Try it with a tiny random model, without a download. It can't write: rewards are 0.",
            f"  gvpo-jax train {config} model.name=debug train.steps=2 run.dir=runs/try",
            "Then train; this downloads a model of 1 GB:",
            f"  gvpo-jax train {config}",
        ]
    )


def _template(name: str) -> bytes:
    for folder in PACKAGED:
        if (file := folder / "init" / name).is_file():
            return file.read_bytes()
    raise UserError(f"gvpo-jax is here without its file {name}: install it again")
