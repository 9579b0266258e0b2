"""Rewards for mathematical answers, compared as mathematics by math-verify."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from gvpo_jax.errors import Page, UserError
from gvpo_jax.rewards import completion_text
from gvpo_jax.rewards.workers import WorkerPool

_INTEGER = r"\d+(?:,\d{3})*"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = r"(?:(?:\\times|\\cdot|\*)10\^\{?-?\d+\}?)?"
_VALUE = re.compile(rf"[-+]?\\?\$?{_DECIMAL}{_POWER_OF_TEN}\\?%?")
_FRACTION = re.compile(r"[-+]?(?:\d*\\frac\{?(\d+?)\}?\{?(\d+)\}?|(\d+)/(\d+))")


def math_verify_reward(*, deadline: float = 30.0, workers: int = 2) -> Callable[..., list[Any]]:
    r"""Make a reward function that compares the answer with the column `solution` as mathematics.

    The answer is what math-verify extracts: \boxed{}, "the answer is", or else the last expression.
    The question given back is no answer, though math-verify takes "3 + 4" for 7: where the solution
    is a number, a number (or a fraction in lowest terms) is asked for, and an expression that
    stands in the question counts only if it is the solution as written. `solution` may be a number,
    LaTeX, a text with \boxed{} or "####", or a list of which all are asked for. It runs in child
    processes; a call past `deadline` seconds fails its row, and so does a solution that can't be
    parsed. The first call of a process takes seconds, on a slow or busy machine many.
    """
    pool = WorkerPool(
        f"{__name__}:check_answer", deadline=deadline, workers=workers, imports=["math_verify"]
    )

    def math_verify(
        prompts: Sequence[Any], completions: Sequence[Any], solution: Sequence[Any], **_: Any
    ) -> list[Any]:
        """1.0 or 0.0 for each of n completions, by n solutions."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                'math-verify is missing: pip install "gvpo-jax[math]"', page=Page.EXTRAS
            )
        texts = [completion_text(completion) for completion in completions]
        questions = [_question(prompt) for prompt in prompts]
        return pool.map(list(zip(questions, texts, map(_one_text, solution), strict=True)))

    return math_verify


def check_answer(question: str, answer: str, solution: str) -> float:
    """1.0 if the answer's final expression equals the solution and isn't the question's own."""
    library = importlib.import_module("math_verify")
    # No time limits in there: they take SIGALRM, and say at each call that they are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = library.parse(_as_latex(solution), parsing_timeout=None)
    if not gold or isinstance(gold[0], str):
        raise ValueError(f"the solution {solution!r} can't be parsed")
    found = library.parse(answer, parsing_timeout=None)
    if not found or not library.verify(gold, found, timeout_seconds=None):  # in this order
        return 0.0
    return float(not _is_unsolved(question, gold, found))


def _is_unsolved(question: str, gold: list[Any], found: list[Any]) -> bool:
    """Whether the expression found equals the solution only after the work that was asked for."""
    written = _squeeze(found[-1] if isinstance(found[-1], str) else str(found[-1]))
    if _is_value(written.rpartition("=")[2]):
        return False
    if getattr(gold[0], "is_Number", False):
        return True
    as_gold = written == _squeeze(str(gold[-1])) or found[0] == gold[0]
    return written in _squeeze(question) and not as_gold


def _is_value(written: str) -> bool:
    if _VALUE.fullmatch(written):
        return True
    fraction = _FRACTION.fullmatch(written)
    if fraction is None:
        return False
    top, bottom = (int(digits) for digits in fraction.groups() if digits is not None)
    return bottom > 1 and gcd(top, bottom) == 1


def _squeeze(text: str) -> str:
    """The text without spacing, sizes and units, for comparing how expressions are written."""
    text = re.sub(r"\\(?:text|mathrm)\{[^{}]*\}|\^\{?\\circ\}?", "", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[\s$]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


def _as_latex(solution: str) -> str:
    solution = solution.rpartition("####")[2].strip()
    marked = "\\boxed" in solution or "$" in solution
    return solution if marked else f"${solution}$"


def _one_text(solution: Any) -> str:
    """Several answers as they are written in one box."""
    if not isinstance(solution, list | tuple):
        return str(solution)
    return ", ".join(str(part).strip().strip("$") for part in solution)


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


math_verify = math_verify_reward()
