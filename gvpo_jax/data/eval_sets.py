"""Evaluation sets, each with its own columns and its own sampling, from the hub or from files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gvpo_jax.data.files import named_by
from gvpo_jax.data.forms import Form
from gvpo_jax.data.rows import PlacedRow, Row, load_rows
from gvpo_jax.errors import UserError
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class EvalSet:
    """A set of held-out rows with a score of its own."""

    name: str = setting("", "Of the set, in its metrics: eval/accuracy/NAME.")
    path: str = setting("", "As data.path: a file, a folder or a dataset of the hub.", path="input")
    subset: str | None = setting(None, "The part of a hub's dataset, as data.name.")
    split: str = setting("test", "The split of a hub's dataset.")
    columns: dict[str, str] = setting({}, "As data.columns.")
    answer_pattern: str | None = setting(None, "As data.answer_pattern.")
    size: int | None = setting(None, "So many rows, the first ones; null: all.", least=1)
    num_generations: int | None = setting(None, "Null: eval.num_generations.", least=1)
    temperature: float | None = setting(None, "Null: eval.temperature.", least=0)


def check_sets(sets: Sequence[EvalSet]) -> None:
    """See that sets can be told apart, and say where their rows are.

    Raises:
        UserError: one does not.
    """
    names = [each.name for each in sets]
    for place, each in enumerate(sets):
        where = f"eval.sets.{place}"
        if not re.fullmatch(r"[\w.+-]{1,64}", each.name):
            raise UserError(
                f"{where}.name={each.name!r}: give a short name of letters, digits, _, -, . and +; "
                "it stands in the metrics"
            )
        if each.name in names[:place]:
            raise UserError(f"{where}.name={each.name}: an earlier set has that name")
        if not each.path:
            raise UserError(
                f"{where} ({each.name}) has no path: give a file, or a dataset of the hub"
            )
        Form(each.columns, each.answer_pattern, section=where).check()


def load_eval_sets(sets: Sequence[EvalSet]) -> list[Row]:
    """The rows of all sets, one set after the other; the column `task` has the set's name.

    Raises:
        UserError: a set is not there, or a row of it can't be used; see `load_rows`.
    """
    rows: list[Row] = []
    for place, each in enumerate(sets):
        where = f"eval.sets.{place}"
        with named_by(f"{where}.path"):
            found = load_rows(
                each.path,
                Form(each.columns, each.answer_pattern, section=where),
                name=each.subset,
                split=each.split,
                settings=(f"{where}.subset", f"{where}.split"),
            )
        rows += [
            PlacedRow(row | {"task": each.name}, getattr(row, "place", ""))
            for row in found[: each.size]
        ]
    return rows
