"""Rows as datasets have them: conversations, other names of columns, answers behind a mark."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gvpo_jax.errors import UserError

# ShareGPT's names of those who speak.
_ROLES = {"human": "user", "gpt": "assistant"}
_TALKS = ("messages", "conversations")


@dataclass(frozen=True)
class Form:
    """How the columns of a dataset become those that a row has here.

    Attributes:
        columns: the names that columns get, and those that they have. A dot leads into a column of
            dicts: `{"solution": "reward_model.ground_truth"}`.
        answer_pattern: a regular expression; what its first group finds in `solution`, or else all
            of what it finds, takes the place of `solution`. Of several the last one counts.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answer_pattern: str | None = None

    def check(self) -> None:
        """Raise UserError where the pattern is none."""
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise UserError(
                f"data.answer_pattern={self.answer_pattern} is no regular expression: {error}"
            ) from None

    def __call__(self, place: str, row: Any) -> Any:
        """The row in this form; what is no dict comes back as it is, to be refused.

        Raises:
            UserError: it has not what the form asks for.
        """
        if not isinstance(row, dict):
            return row
        if self.columns:
            used = {old for old in self.columns.values() if old in row}
            rest = {name: value for name, value in row.items() if name not in used}
            row = rest | {new: _at(place, row, old) for new, old in self.columns.items()}
        row = from_talk(row)
        if self.answer_pattern is not None:
            row = row | {"solution": self._answer(place, row)}
        return row

    def _answer(self, place: str, row: Mapping[str, Any]) -> str:
        text = row.get("solution")
        if not isinstance(text, str):
            has = "no column 'solution'" if text is None else f"'solution' is {text!r}"
            raise UserError(
                f"{place}: data.answer_pattern looks for the answer in a text, and there is {has}; "
                "data.columns={solution: NAME} takes another column"
            )
        found = list(re.finditer(self.answer_pattern or "", text))
        if not found:
            raise UserError(
                f"{place}: data.answer_pattern={self.answer_pattern} finds nothing in 'solution', "
                f"which ends in {text[-80:]!r}"
            )
        last = found[-1]
        return (last[1] if last.re.groups else last[0]).strip()


def from_talk(row: dict[str, Any]) -> dict[str, Any]:
    """A row that has a whole conversation and no prompt: what comes before the last answer.

    The conversation is the column `messages` or `conversations`, of `role` and `content` or of
    `from` and `value`. Its last answer becomes `solution`, if there is no such column.
    """
    name = next((name for name in _TALKS if "prompt" not in row and name in row), None)
    talk: Any = row[name] if name else None
    talk = talk.tolist() if isinstance(talk, np.ndarray) else talk
    if not (isinstance(talk, list) and talk and all(isinstance(turn, dict) for turn in talk)):
        return row
    messages = [_message(turn) for turn in talk]
    rest = {key: value for key, value in row.items() if key != name}
    answer = messages.pop() if messages[-1].get("role") == "assistant" else None
    if answer and "solution" not in rest:
        rest["solution"] = answer.get("content")
    return {"prompt": messages} | rest


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    if "from" not in turn or "role" in turn:
        return dict(turn)
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} | rest


def _at(place: str, row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(
                f"{place}: no column {name!r}, which data.columns names; the columns are "
                f"{', '.join(map(str, row)) or 'none'}"
            )
        value = value[part]
    return value
