"""Prompts and completions as token ids: what the data section of a config asks for."""

import datetime
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gvpo_jax.data.encoding import Encoder, id_problem, writes_date
from gvpo_jax.data.files import named_by
from gvpo_jax.data.fingerprints import stable_json
from gvpo_jax.data.forms import Form
from gvpo_jax.data.hub import is_hub_name
from gvpo_jax.data.reasoning_gym import TaskConfig, reasoning_gym_rows
from gvpo_jax.data.rows import (
    PlacedRow,
    Row,
    as_rows,
    check_text,
    columns_of,
    load_rows,
    load_sets,
    read_rows,
)
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.settings import setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataConfig:
    """Rows to train on and to be judged by, and how their prompts become tokens."""

    path: str | None = setting(
        None,
        "Rows with a column `prompt`: .jsonl, .json, .csv (also with .gz) or .parquet; a folder or "
        "a pattern such as data/train-*.jsonl takes all such files by name; or a dataset of the "
        "Hugging Face hub such as openai/gsm8k. Or ...",
        path="input",
    )
    eval_path: str | None = setting(None, "Held-out rows, with the same columns.", path="input")
    name: str | None = setting(None, "The part of a hub's dataset, e.g. main.")
    split: str = setting("train", "The split of a hub's dataset that path takes.")
    eval_split: str = setting("test", "The split of a hub's dataset that eval_path takes.")
    columns: dict[str, str] = setting(
        {},
        "Columns under other names: {prompt: question, solution: answer}; a dot leads into a "
        "column of dicts.",
    )
    answer_pattern: str | None = setting(
        None,
        "A regular expression for the answer in the column `solution`, e.g. '#### *(.+)': its last "
        "match takes the place of the column.",
    )
    filter: str | None = setting(
        None,
        "module:function, or path/file.py:function: it gets a row and says whether it stays.",
        path="function",
    )
    tasks: list[TaskConfig] = setting([], "... tasks that rows are drawn from, or ...")
    groups_path: str | None = setting(
        None,
        "... groups that were sampled elsewhere, see gvpo_jax.collect.offline.",
        path="input",
    )
    bad_samples: Literal["error", "skip"] = setting(
        "error",
        "A completion in groups_path that is empty, too long or without a finite reward, and a "
        "group that keeps fewer than two; skip counts them.",
    )
    train_size: int = setting(1000, "Rows drawn from the tasks.", least=1)
    eval_size: int = setting(
        256,
        "Held-out rows, drawn from the tasks, or the first ones of each file of eval_path; 0: no "
        "evaluation.",
        least=0,
    )
    eval_seed: int = setting(0, "Held-out rows do not follow run.seed: runs can be compared.")
    chat_template: Literal["auto", "never", "always"] = setting(
        "auto", "auto: for lists of messages only; always: a text is one user message."
    )
    template: str | None = setting(
        None,
        "A Jinja chat template, or its file, in place of the tokenizer's own.",
        path="template",
    )
    template_date: str | None = setting(
        None,
        "The day that a chat template may write, e.g. 2026-07-31; null: the one on which the run "
        "began.",
    )
    system_prompt: str | None = setting(
        None, "Opens every templated prompt that has no system message of its own."
    )
    template_arguments: dict[str, Any] = setting(
        {}, "Handed to the chat template, such as {enable_thinking: false}."
    )
    max_prompt_length: int = setting(512, "Tokens; longer prompts are never cut.", least=1)
    too_long: Literal["error", "skip"] = setting("error", "What becomes of longer prompts.")
    shuffle: bool = setting(
        True, "Each epoch in an order of its own; false: rows in their order, epoch after epoch."
    )
    streaming: bool = setting(
        False, "Read the rows of path while training goes on, not all of them before it."
    )
    shuffle_buffer: int = setting(
        10_000, "Rows that streaming holds to draw the next one from, with shuffle.", least=1
    )

    def load(
        self, seed: int, keep: Callable[[Row], Any] | None = None
    ) -> tuple[list[Row], list[Row]]:
        """Training rows and held-out rows, from files, the hub or generated tasks.

        seed: of the training rows that are drawn from tasks. keep: the function `filter`.

        Raises:
            UserError: none or several sources are given, or what reading them raises.
        """
        return self.load_training(seed, keep), self.load_held_out(keep)

    def load_training(self, seed: int, keep: Callable[[Row], Any] | None = None) -> list[Row]:
        """The training rows alone; see `load`."""
        # Beside given groups, tasks are there for the held-out rows alone.
        drawn = bool(self.tasks) and not self.groups_path
        if [bool(self.path), bool(self.groups_path), drawn].count(True) != 1:
            raise UserError("give one of data.path, data.groups_path and data.tasks")
        form = self._form()
        if not (path := self.path or self.groups_path):
            return reasoning_gym_rows(self.tasks, size=self.train_size, seed=seed, split="train")
        with named_by("data.path" if self.path else "data.groups_path"):
            return load_rows(path, form, keep=keep, name=self.name, split=self.split)

    def read_training(self, keep: Callable[[Row], Any] | None = None) -> Iterator[Row]:
        """The rows of `path`, one after the other, read as they are asked for."""
        if not self.path:
            raise UserError("data.streaming needs data.path")
        options = {"keep": keep, "name": self.name, "split": self.split, "streaming": True}
        with named_by("data.path"):
            yield from read_rows(self.path, self._form(), **options)

    def load_held_out(self, keep: Callable[[Row], Any] | None = None) -> list[Row]:
        """The held-out rows alone; see `load`."""
        form, size = self._form(), self.eval_size
        if self.eval_path and size:
            options = {"form": form, "keep": keep, "name": self.name, "split": self.eval_split}
            with named_by("data.eval_path"):
                return load_sets(self.eval_path, size, **options)
        if not (self.tasks and size):
            return []
        return reasoning_gym_rows(self.tasks, size=size, seed=self.eval_seed, split="eval")

    def _form(self) -> Form:
        """What `columns` and `answer_pattern` ask for; raises where a setting can't be meant so."""
        form = Form(self.columns, self.answer_pattern)
        form.check()
        self._check_hub()
        return form

    def _check_hub(self) -> None:
        """Raise UserError where a setting of the hub's datasets would be passed over."""
        of_hub = [
            bool(path) and is_hub_name(path) for path in (self.path or "", self.eval_path or "")
        ]
        used = {"name": any(of_hub), "split": of_hub[0], "eval_split": of_hub[1]}
        for setting_name, is_used in used.items():
            value = getattr(self, setting_name)
            if value != getattr(DataConfig, setting_name) and not is_used:
                raise UserError(
                    f"data.{setting_name}={value} is for datasets of the hub, such as "
                    "openai/gsm8k: the rows here are not from there"
                )

    def day(self) -> datetime.date:
        """The day that a chat template may write.

        Raises:
            UserError: `template_date` is none.
        """
        if self.template_date is None:
            return datetime.date.today()
        try:
            return datetime.date.fromisoformat(self.template_date)
        except ValueError:
            raise UserError(
                f"data.template_date={self.template_date} is no day; write it as 2026-07-31"
            ) from None

    def template_writes_date(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the chat template asks for the date."""
        return writes_date(self.template or tokenizer.chat_template)

    @explained_by(Page.PROMPTS)
    def encode(
        self, rows: Any, tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None = None
    ) -> "EncodedPrompts":
        """The rows' prompts as token ids, each together with its row's `answer_prefix`.

        A templated prompt gets no further special tokens; `chat_template=never` takes texts only.

        Args:
            rows: whatever `as_rows` takes, with `prompt`.
            tokenizer: makes token ids of texts.
            vocab_size: the embedding's rows, which token ids must be below.

        Raises:
            UserError: naming the row (its file and line, or its number from 1), where a prompt
                can't be encoded, or is longer than `max_prompt_length` tokens and `too_long` is
                `error`; or no row is left.
        """
        rows = as_rows(rows)
        if not rows:
            raise UserError("there are no rows; give at least one with a prompt")
        encoder = Encoder(self, tokenizer, vocab_size)
        kept: list[Row] = []
        token_ids: list[list[int]] = []
        undated: list[list[int]] = []
        for number, row in enumerate(rows, start=1):
            row = PlacedRow(row, getattr(row, "place", f"row {number}"))
            ids = encoder.ids(row)
            if ids is None:
                continue
            kept.append(row)
            token_ids.append(ids)
            if encoder.dated:
                undated.append(encoder.undated_ids(row))
        if not kept:
            raise UserError(
                f"no prompt is left: all {len(rows)} are over {self.max_prompt_length} tokens"
            )
        return EncodedPrompts(kept, token_ids, len(rows) - len(kept), undated)


@dataclass(frozen=True)
class EncodedPrompts:
    """Rows whose prompts fit, their token ids (a list per row), the number of rows left out."""

    rows: list[Row]
    token_ids: list[list[int]]
    skipped: int
    # Where the chat template writes the date: the token ids with the same one every day.
    undated: Sequence[list[int]] = ()

    @functools.cached_property
    def columns(self) -> list[str]:
        """The names of all columns that reward functions are given."""
        return list(columns_of(self.rows))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.token_ids))

    @property
    def head(self) -> "EncodedPrompts":
        """All of them; of a stream it is the first."""
        return self

    def fingerprint(self) -> str:
        """A short text that tells these rows, in this order and tokenisation, from others.

        The date that the chat template may have written is left out of it.
        """
        try:
            content = stable_json([self.rows, self.undated or self.token_ids])
        except (ValueError, RecursionError):
            raise UserError("a row of the data contains itself in one of its columns") from None
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def completion_ids(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
) -> list[int]:
    """A completion given as text, as token ids with the end token, if it does not end in one.

    A text that ends in a stop token already gets no other; white space behind it is left out.

    Args:
        text: the completion.
        tokenizer: makes token ids of it.
        stop_ids: tokens that end a text; the first one is put where the tokenizer has no end token.
        vocab_size: the embedding's rows, which token ids must be below.

    Raises:
        UserError: a token id is not, or as `check_text` does.
    """
    check_text(text)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if problem := id_problem(ids, tokenizer, vocab_size):
        raise UserError(problem)
    end: Any = tokenizer.eos_token_id  # a model may name several; this one ends its texts
    first = next((n for n, token in enumerate(ids, start=1) if token in (end, *stop_ids)), None)
    if first and not str(tokenizer.decode(ids[first:], skip_special_tokens=True)).strip():
        return ids[:first]  # a line break after an end mark comes from a chat template
    return [*ids, *([end] if isinstance(end, int) else stop_ids[:1])]
