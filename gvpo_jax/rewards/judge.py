r"""A language model as judge, on a server that speaks OpenAI's chat completions (extra `servers`).

from gvpo_jax.rewards.judge import LLMJudge

helpful = LLMJudge(
"http://localhost:8000",
"Qwen/Qwen2.5-7B-Instruct",
"Question: {prompt}\nAnswer: {completion}\nHow helpful is it? End with 'Grade: N', 0 to 10.",
full_marks=10,
)
"""

import asyncio
import hashlib
import inspect
import json
import math
import os
import re
import string
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.http import (
    BadReply,
    TryAgain,
    check_address,
    client_options,
    describe_failure,
    exchange,
    load_httpx,
    one_short_line,
    pause,
    read_answer,
)
from gvpo_jax.rewards import RewardError, completion_text
from gvpo_jax.rewards.attempt import attempt

_GRADE = r"Grade:\s*\**\s*(-?\d+(?:\.\d+)?)"
_PATH = "/v1/chat/completions"


class LLMJudge:
    """A reward function that asks a model for a grade; the reward is the grade / `full_marks`.

    Questions that are alike are asked once. Many are asked at a time, by one client for the run.
    Connection errors, time-outs and the statuses 429 and 5xx are tried again after a pause that
    doubles. A completion whose grade can't be had has failed, see `rewards.on_error`.

    Args:
        url: of the server, e.g. "http://localhost:8000" or "https://api.openai.com/v1".
        model: its name there.
        template: of the question, with {prompt}, {completion} and columns of the data, say
            {solution}; of a chat prompt, {prompt} is the text of its messages.
        system: a system message; None: there is none.
        grade: a regular expression whose last match in the answer has the grade in its group 1.
        full_marks: the best grade; one outside of 0 to `full_marks` counts as none.
        api_key_env: the environment variable that holds the server's key; None: there is no key.
        concurrency: questions under way at a time, of each process.
        per_minute: questions that may begin in a minute, of each process; None: any number.
        timeout: seconds that one try may take.
        retries: tries after the first.
        options: further fields of the request, say {"max_tokens": 512}. The temperature is 0
            unless it is given here.
        cache: a JSONL file that keeps grades from run to run; None: only this process does.
        name: of the reward in metrics and records; None: the variable's, where it is found by
            name, else "judge".

    Raises:
        UserError: something is not what it should be, or the key is not there.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        *,
        system: str | None = None,
        grade: str = _GRADE,
        full_marks: float = 10.0,
        api_key_env: str | None = None,
        concurrency: int = 32,
        per_minute: float | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        options: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        name: str | None = None,
    ):
        check_address(url, "api_key_env")
        self.__name__, self._named = name or "judge", name is not None
        self._url = url.rstrip("/").removesuffix("/v1") + _PATH
        self._template, self._system = template, system
        self._columns = _columns(template)
        self._grade, self._full_marks = _pattern(grade), full_marks
        _check_numbers(full_marks, concurrency, per_minute, timeout, retries)
        self._headers = _authorization(api_key_env)
        self._concurrency, self._per_minute = concurrency, per_minute
        self._timeout, self._retries = timeout, retries
        self._body = {"model": model, "temperature": 0.0} | _json_options(options or {})
        self._states: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()
        self._cache = None if cache is None else Path(cache).expanduser()
        self._grades = _read_cache(self._cache)
        # What tells it from other judges, see `functions.code_fingerprint`; not where it runs.
        about = [self._body, template, system, grade, full_marks]
        self.own_code = json.dumps(about, sort_keys=True, default=str)
        self.__signature__ = _signature(self._columns)

    def take_name(self, name: str) -> None:
        """Be called so, unless it has a name of its own."""
        self.__name__ = self.__name__ if self._named else name

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[Any]:
        """Rewards of n completions, 0 to 1; an exception in the place of one that failed."""
        bodies = []  # or why there is none
        for i, sample in enumerate(zip(prompts, completions, strict=True)):
            given = {name: columns[name][i] for name in self._columns}
            bodies.append(attempt(self._question, *sample, given))
        keys = [x if isinstance(x, Exception) else self._key(x) for x in bodies]
        asked = zip(keys, bodies, strict=True)
        new = {k: x for k, x in asked if isinstance(k, str) and k not in self._grades}
        answers = await asyncio.gather(*(self._ask(body) for body in new.values()))
        told: dict[str, Any] = dict(zip(new, answers, strict=True))
        self._keep({key: x for key, x in told.items() if not isinstance(x, Exception)})
        known = self._grades | told
        return [known[key] if isinstance(key, str) else key for key in keys]

    def _question(self, prompt: Any, completion: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        texts = {"prompt": prompt_text(prompt), "completion": completion_text(completion)}
        values = {**given, **texts}
        system = [{"role": "system", "content": self._system}] if self._system else []
        text = self._template.format(**values)
        text.encode()  # raises for lone surrogates, which JSON over HTTP can't carry
        asked = {"role": "user", "content": text}
        return self._body | {"messages": [*system, asked]}

    async def _ask(self, body: Mapping[str, Any]) -> float | RewardError:
        state, reason = self._state(), ""
        httpx = load_httpx()
        for number in range(self._retries + 1):
            if number:
                await asyncio.sleep(pause(0.5, number))
            try:
                async with state.places:
                    await state.turn(self._per_minute)
                    answer = await exchange(state.client, self._url, body, self._timeout)
                said = read_answer(answer, lambda x: x["choices"][0]["message"]["content"])
                return self._read(str(said))
            except BadReply as error:
                return RewardError(one_short_line(f"{self._url}: {error}"))
            except (TryAgain, OSError, httpx.HTTPError) as error:
                reason = describe_failure(error, self._timeout)
        tries = f"tried {self._retries + 1} times" if self._retries else "tried once"
        return RewardError(one_short_line(f"{self._url}: {reason}") + f" ({tries})")

    def _read(self, said: str) -> float:
        """The reward that an answer gives."""
        found = self._grade.findall(said)
        if not found:
            raise BadReply(f"no grade in the answer, which ends with {said[-80:]!r}")
        first = found[-1] if isinstance(found[-1], str) else found[-1][0]
        try:
            grade = float(first)
        except ValueError:
            raise BadReply(f"the grade {first!r} is no number") from None
        if not 0 <= grade <= self._full_marks:
            raise BadReply(f"the grade {first} is not from 0 to {self._full_marks:g}")
        return grade / self._full_marks

    def _state(self) -> "_State":
        """That of the running event loop, of which a run's rewards have one."""
        loop = asyncio.get_running_loop()
        if loop not in self._states:
            client = load_httpx().AsyncClient(**client_options(self._headers))
            self._states[loop] = _State(client, self._concurrency)
        return self._states[loop]

    def _key(self, body: Mapping[str, Any]) -> str:
        about = [body, self._grade.pattern, self._full_marks]
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def _keep(self, grades: Mapping[str, float]) -> None:
        self._grades |= grades
        if self._cache is None or not grades:
            return
        lines = [json.dumps({"key": key, "reward": reward}) for key, reward in grades.items()]
        try:
            with self._cache.open("a", encoding="utf-8") as file:
                # After a line that was cut off, if the last one was.
                file.write("\n".join(["", *lines, ""]))
        except OSError as error:
            raise UserError(f"the judge's cache {self._cache} can't be written: {error}") from None


class _State:
    """What belongs to one event loop: connections, and whose turn it is."""

    def __init__(self, client: Any, concurrency: int):
        self.client, self.places = client, asyncio.Semaphore(concurrency)
        self._next = time.monotonic()

    async def turn(self, per_minute: float | None) -> None:
        if per_minute is None:
            return
        begins = max(self._next, time.monotonic())
        self._next = begins + 60 / per_minute
        await asyncio.sleep(begins - time.monotonic())


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: itself, the one message's content, or "role: content" of several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _columns(template: str) -> list[str]:
    """The data's columns that a template names."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"a judge's template: {error}; double a brace that is text") from None
    if strange := [name for name in names if not name.isidentifier()]:
        raise UserError(
            f"a judge's template has {{{strange[0]}}}: name prompt, completion or a column, and "
            "double a brace that is text"
        )
    if "completion" not in names:
        raise UserError("a judge's template must show the {completion}")
    return [name for name in dict.fromkeys(names) if name not in ("prompt", "completion")]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"a judge's grade {text!r} is no regular expression: {error}") from None
    if not pattern.groups:
        raise UserError(f"a judge's grade {text!r} needs a group, which holds the number")
    return pattern


def _authorization(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise UserError("a judge's api_key_env is the name of an environment variable, not a key")
    if not (key := os.environ.get(api_key_env, "").strip()):
        raise UserError(
            f"a judge's api_key_env={api_key_env}: this environment variable is empty; put the key "
            "in it"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {api_key_env} holds no key of plain characters")
    return {"Authorization": f"Bearer {key}"}


def _read_cache(path: Path | None) -> dict[str, float]:
    """Grades by key; lines that were cut off are left out."""
    grades: dict[str, float] = {}
    if path is None:
        return grades
    if not path.parent.is_dir():
        raise UserError(f"the judge's cache {path} can't be written: there is no such folder")
    if not path.exists():
        return grades
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"the judge's cache {path} can't be read: {error}") from None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            grades[str(entry["key"])] = float(entry["reward"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return grades


def _check_numbers(full_marks, concurrency, per_minute, timeout, retries) -> None:
    whole = isinstance(concurrency, int) and isinstance(retries, int)
    above = [full_marks, concurrency, timeout, *([] if per_minute is None else [per_minute])]
    if not (whole and all(isinstance(x, int | float) and 0 < x < math.inf for x in above)):
        raise UserError(
            "a judge's full_marks, concurrency, per_minute and timeout must be above 0, and "
            "concurrency and retries whole numbers"
        )
    if retries < 0:
        raise UserError(f"a judge's retries={retries}: give 0 or more")


def _json_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields of the request, as they are sent."""
    if taken := {"messages", "stream"} & set(options):
        raise UserError(f"a judge's options can't set {', '.join(sorted(taken))}")
    try:
        return json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"a judge's options are no JSON: {error}") from None


def _signature(columns: Sequence[str]) -> inspect.Signature:
    """That of a reward function of lists which needs these columns."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    lists = [inspect.Parameter(name, kind) for name in ("prompts", "completions")]
    needed = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in columns]
    rest = inspect.Parameter("_", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*lists, *needed, rest])
