"""Rows as datasets have them: conversations, other names of columns, answers behind a mark."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gvpo_jax.errors import Page, UserError, explained_by

# ShareGPT's names of those who speak, in lower case.
_ROLES = {name: name for name in ("system", "user", "assistant", "tool", "developer")}
_ROLES |= {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
_TALKS = ("messages", "conversations")


@dataclass(frozen=True)
class Form:
    """How the columns of a dataset become those that a row has here.

    Attributes:
        columns: the names that columns get, and those that they have. A dot leads into a column of
            dicts: `{"solution": "reward_model.ground_truth"}`.
        answer_pattern: a regular expression; what its first group finds in `solution`, or else all
            of what it finds, takes the place of `solution`. Of several finds the last one counts
            that is not empty.
        section: of the config that says so, for messages.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answer_pattern: str | None = None
    section: str = "data"

    def check(self) -> None:
        """Raise UserError where the pattern is none."""
        if self.answer_pattern == "":
            raise UserError(
                f"{self.section}.answer_pattern is empty: give a regular expression, or null"
            )
        try:
            re.compile(self.answer_pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"{self.section}.answer_pattern={self.answer_pattern} is no regular expression: "
                f"{error}"
            ) from None

    @explained_by(Page.COLUMNS)
    def named(self, place: str, row: Any) -> Any:
        """The row with its columns under their new names.

        What is no dict comes back as it is, to be refused.

        Raises:
            UserError: it has not what the form asks for.
        """
        if not isinstance(row, dict) or not self.columns:
            return row
        used = {old for old in self.columns.values() if old in row}
        rest = {name: value for name, value in row.items() if name not in used}
        return rest | {new: self._at(place, row, old) for new, old in self.columns.items()}

    @explained_by(Page.COLUMNS)
    def answered(self, place: str, row: Any) -> Any:
        """The row with the answer alone as its `solution`.

        Raises:
            UserError: the pattern finds none.
        """
        if self.answer_pattern is None or not isinstance(row, dict):
            return row
        return row | {"solution": self._answer(place, row)}

    def _answer(self, place: str, row: Mapping[str, Any]) -> str:
        text = row.get("solution")
        if not isinstance(text, str):
            has = "no column 'solution'" if text is None else f"'solution' is {text!r}"
            raise UserError(
                f"{place}: {self.section}.answer_pattern looks for the answer in a text, and there "
                f"is {has}; {self.section}.columns={{solution: NAME}} takes another column"
            )
        finds = re.finditer(self.answer_pattern or "", text)
        found = [next(filter(None, find.groups()), "") or find[0] for find in finds]
        if not (answers := [answer.strip() for answer in found if answer.strip()]):
            raise UserError(
                f"{place}: {self.section}.answer_pattern={self.answer_pattern} finds nothing in "
                f"'solution', which ends in {text[-80:]!r}"
            )
        return answers[-1]

    def _at(self, place: str, row: Mapping[str, Any], name: str) -> Any:
        if name in row:
            return row[name]
        value: Any = row
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise UserError(
                    f"{place}: no column {name!r}, which {self.section}.columns names; the columns "
                    f"are {', '.join(map(str, row)) or 'none'}"
                )
            value = value[part]
        return value


def from_talk(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row that has a whole conversation and no prompt: what comes before the last answer.

    The conversation is the column `messages` or `conversations`, of `role` and `content` or of
    `from` and `value`. Its last answer becomes `solution`, if there is no such column.

    Raises:
        UserError: nobody knows who speaks.
    """
    given = row.get("prompt") is not None
    name = next((name for name in _TALKS if not given and row.get(name) is not None), None)
    talk: Any = row[name] if name else None
    talk = talk.tolist() if isinstance(talk, np.ndarray) else talk
    if not (isinstance(talk, list) and talk and all(isinstance(turn, dict) for turn in talk)):
        return row
    messages = [_message(place, turn) for turn in talk]
    rest = {key: value for key, value in row.items() if key not in (name, "prompt")}
    answer = messages.pop() if messages[-1].get("role") == "assistant" else None
    if answer and rest.get("solution") is None:
        rest["solution"] = answer.get("content")
    return {"prompt": messages} | rest


def _message(place: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    message = dict(turn)
    if "from" in turn and "role" not in turn:
        message["role"], message["content"] = message.pop("from"), message.pop("value", None)
    role = message.get("role")
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise UserError(
            f"{place}: the conversation has a turn of {role!r}; those who speak are "
            f"{', '.join(_ROLES)}"
        )
    return message | {"role": known}
