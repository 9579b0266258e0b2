"""Rows of data, and the order in which training visits them.

A row is a plain dict: `prompt` (a string or a list of chat messages) and any other columns, which
the reward functions receive under their own names. The column `answer_prefix` is text put at the
start of the answer, after the prompt. A message's content may be a list of text parts,
`{"type": "text", "text": "..."}`: they are joined. A row without a prompt may have a whole
conversation, see `gvpo_jax.data.forms.from_talk`.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_jax.buckets import fetch, is_address
from gvpo_jax.data.files import files_of, read_files, set_name
from gvpo_jax.data.forms import Form, from_talk
from gvpo_jax.data.hub import is_hub_name, read_hub
from gvpo_jax.errors import Page, UserError, explained_by

Row = dict[str, Any]


class PlacedRow(dict[str, Any]):
    """A row that knows where it came from, for messages."""

    def __init__(self, row: Mapping[str, Any], place: str):
        super().__init__(row)
        self.place = place  # such as "train.jsonl:3" or "row 3"


@explained_by(Page.ROWS)
def load_rows(
    path: str | Path,
    form: Form | None = None,
    *,
    keep: Callable[[Row], Any] | None = None,
    name: str | None = None,
    split: str = "train",
    settings: tuple[str, str] = ("data.name", "data.split, or data.eval_split,"),
) -> list[Row]:
    """Read the rows of a file, of several one after the other, or of a dataset of the hub.

    Args:
        path: a file that ends in .jsonl (one JSON object a line), .json (one array of objects, or
            such lines), .csv (names of columns in the first line), these with .gz, or .parquet; a
            folder of such files; or a pattern such as `data/train-*.jsonl`. All of them may be
            addresses in a bucket, as `gs://bucket/train.jsonl`. Several files come in the order of
            their names. Or a name on the Hugging Face hub, such as `openai/gsm8k`.
        form: how the columns become those of a row.
        keep: which rows stay: those for which it gives what is true.
        name: of a part of the hub's dataset, such as `main`.
        split: of the hub's dataset.
        settings: what messages call these two.

    Returns:
        `PlacedRow`s.

    Raises:
        UserError: naming file and line (row, where there are no lines), for whatever is not a row
            with a usable prompt; or there is no such file or dataset, or no row; or `keep` fails,
            or keeps none.
    """
    return list(read_rows(path, form, keep=keep, name=name, split=split, settings=settings))


def read_rows(
    path: str | Path,
    form: Form | None = None,
    *,
    keep: Callable[[Row], Any] | None = None,
    name: str | None = None,
    split: str = "train",
    settings: tuple[str, str] = ("data.name", "data.split, or data.eval_split,"),
    streaming: bool = False,
) -> Iterator[PlacedRow]:
    """The rows of `load_rows`, one after the other, read as they are asked for.

    streaming: a hub's dataset is not downloaded first.
    """
    if is_hub_name(str(path)):
        found = read_hub(str(path), name, split, settings, streaming=streaming)
    else:
        found = read_files(fetch(str(path)) if is_address(path) else Path(path))
    form, nothing = form or Form(), True
    for place, row in found:
        row = _joined(form.named(place, row), place)
        if keep is not None and isinstance(row, dict) and not _is_kept(place, row, keep):
            continue
        row = form.answered(place, row)
        check_row(place, row)
        nothing = False
        yield PlacedRow(row, place)
    if nothing:
        raise UserError(f"{path}: data.filter keeps no row" if keep else f"{path} holds no rows")


def as_row(row: Any, number: int) -> PlacedRow:
    """An entry of a dataset as a row.

    Raises:
        UserError: it is none.
    """
    if isinstance(row, PlacedRow):
        return row
    if not isinstance(row, Mapping):
        raise UserError(
            f'row {number}: a row is a dict like {{"prompt": "..."}}, this is a '
            f"{type(row).__name__}"
        )
    place = f"row {number}"
    return PlacedRow(_joined(dict(row), place), place)


@explained_by(Page.ROWS)
def load_sets(path: str | Path, size: int, **options: Any) -> list[Row]:
    """The first rows of each evaluation set: of a file, a folder, a pattern or a hub's dataset.

    Each file is a set; those that `datasets` numbers, as `test-00000-of-00002`, are one. Of several
    sets the rows get a column `task`, the file's name, if they have none.

    Args:
        path: see `load_rows`.
        size: of each set.
        **options: see `load_rows`.

    Raises:
        UserError: see `load_rows`.
    """
    if is_hub_name(str(path)):
        return load_rows(path, **options)[:size]
    sets: dict[str, list[Row]] = {}
    for file in files_of(fetch(str(path)) if is_address(path) else Path(path)):
        sets.setdefault(set_name(file), []).extend(load_rows(file, **options))
    if len(sets) == 1:
        return next(iter(sets.values()))[:size]
    return [
        PlacedRow({"task": name} | row, getattr(row, "place", ""))
        for name, rows in sets.items()
        for row in rows[:size]
    ]


def _is_kept(place: str, row: Row, keep: Callable[[Row], Any]) -> bool:
    try:
        stays = keep(copy.deepcopy(row))
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{place}: data.filter failed: {' '.join(problem.split())}") from error
    if inspect.isawaitable(stays):
        stays.close() if inspect.iscoroutine(stays) else None
        raise UserError("data.filter is async: write a plain function that gives True or False")
    return bool(stays)


@explained_by(Page.ROWS)
def as_rows(dataset: Any) -> list[Row]:
    """The rows of a dataset: a list of dicts, a `datasets.Dataset`, a DataFrame, a generator.

    What a DataFrame lacks is None. Of a `DatasetDict` the only split is taken.

    Raises:
        UserError: it is none, or has several splits, or an entry is no row.
    """
    dataset = _only_split(dataset)
    if hasattr(dataset, "to_pylist"):  # pyarrow
        dataset = dataset.to_pylist()
    elif hasattr(dataset, "to_dicts"):  # polars
        dataset = dataset.to_dicts()
    elif hasattr(dataset, "iterrows"):  # pandas
        dataset = dataset.astype(object).where(dataset.notna(), None).to_dict("records")
    if isinstance(dataset, Mapping):
        raise UserError(
            f"the dataset is a mapping of {', '.join(map(str, dataset)) or 'nothing'}; give a list "
            'of rows: one split, dataset["train"], or a dict for each row in place of each column'
        )
    gives_rows = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    if isinstance(dataset, str | bytes | Path) or not gives_rows:
        raise UserError(
            f"a dataset is a list of rows, this is a {type(dataset).__name__}; "
            "gvpo_jax.data.rows.load_rows reads a file"
        )
    return [as_row(row, number) for number, row in enumerate(dataset, start=1)]


def _only_split(dataset: Any) -> Any:
    """That of a mapping of datasets, as `datasets.load_dataset` gives it without `split`."""
    of_splits = isinstance(dataset, Mapping) and len(dataset) > 0
    if not of_splits or not all(hasattr(part, "column_names") for part in dataset.values()):
        return dataset
    if len(dataset) == 1:
        return next(iter(dataset.values()))
    name = "train" if "train" in dataset else next(iter(dataset))
    raise UserError(
        f"the dataset has the splits {', '.join(map(str, dataset))}: give one of them, as "
        f'dataset["{name}"]'
    )


def columns_of(
    rows: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None
) -> dict[str, list[Any]]:
    """The rows' columns as reward functions expect them: lists, with None where a row lacks one.

    names: those of the columns, also where none of the rows has one; None: those that they have.
    Without those that the caller passes under names of its own (`prompt`, `completion`,
    `completion_ids`).
    """
    own = ("prompt", "completion", "completion_ids")
    if names is None:
        names = dict.fromkeys(name for row in rows for name in row if name not in own)
    return {name: [row.get(name) for row in rows] for name in names}


def check_text(text: str) -> None:
    """Raise UserError where a text holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"the text holds {half}, half of a character such as a cut emoji; mend or remove it"
        ) from None


def batch_indices(
    n_rows: int, batch_size: int, step: int, seed: int, *, shuffle: bool = True
) -> np.ndarray:
    """Row numbers [batch_size] of batch number `step`.

    Epochs follow each other endlessly, each in an order of its own, or without `shuffle` in that of
    the rows, and are cut into batches. A pure function, so a run resumes from `step` alone. Every
    epoch holds each row once; a batch may straddle two epochs, and so hold a row twice.
    """
    if n_rows < 1 or batch_size < 1 or step < 0 or seed < 0:
        raise ValueError(
            "need n_rows and batch_size >= 1, step and seed >= 0; "
            f"got {n_rows}, {batch_size}, {step}, {seed}"
        )
    epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n_rows)
    if not shuffle:
        return offsets
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = shuffled(n_rows, seed, int(epoch))[offsets[here]]
    return indices


def shuffled(n: int, *key: int) -> np.ndarray:
    """The numbers below n in an order that depends on the key alone."""
    # Raw bits keep their values across NumPy versions; Generator.permutation doesn't promise to.
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


def check_row(place: str, row: Any) -> None:
    """Raise UserError, with its place, for whatever is not a row with a usable prompt."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row is a JSON object, this is a {type(row).__name__}")
    if "prompt" not in row:
        raise UserError(f"{place}: no column 'prompt'; the columns are {', '.join(row) or 'none'}")
    if not isinstance(row.get("answer_prefix"), str | None):
        raise UserError(f"{place}: 'answer_prefix' must be text")
    prompt = row["prompt"]
    messages = prompt if isinstance(prompt, list) else []
    kinds = [part.get("type") for message in messages for part in _parts(message)]
    kinds += [name for name in ("image", "images") if not _is_empty(row.get(name))]
    if others := [kind for kind in kinds if kind != "text"]:
        raise UserError(
            f"{place}: the row has {others[0]!r}, and training is on text alone: leave such rows "
            "out, or take it from them"
        )
    if isinstance(prompt, str):
        if not prompt:
            raise UserError(f"{place}: the prompt is empty")
        return
    if not (isinstance(prompt, list) and prompt and all(_is_message(m) for m in prompt)):
        raise UserError(
            f"{place}: 'prompt' must be text or a list of messages "
            '{"role": "user", "content": "..."}'
        )
    if prompt[-1]["role"] == "assistant":
        raise UserError(
            f"{place}: the last message is the assistant's; put the start of its answer into the "
            "column 'answer_prefix'"
        )


def _joined(row: Any, place: str) -> Any:
    """The row with the texts of its messages in one piece each, and its messages in a list."""
    if not isinstance(row, dict):
        return row
    row = from_talk(place, row)
    prompt, solution = row.get("prompt"), row.get("solution")
    if isinstance(solution, list) and "prompt" in row:  # the answer of a conversation, in parts
        row = row | {"solution": _joined_message({"content": solution})["content"]}
    if isinstance(prompt, np.ndarray):  # as pandas reads it from Parquet
        prompt = prompt.tolist()
    if not isinstance(prompt, list):
        return row
    return row | {"prompt": [_joined_message(message) for message in prompt]}


def _joined_message(message: Any) -> Any:
    texts = [part["text"] for part in _parts(message) if isinstance(part.get("text"), str)]
    if not texts or len(texts) < len(message["content"]):
        return message
    return {**message, "content": "".join(texts)}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list) and not value)


def _parts(message: Any) -> list[dict]:
    """What a message's content consists of, if it is a list: texts, images, ..."""
    content = message.get("content") if isinstance(message, dict) else None
    content = content.tolist() if isinstance(content, np.ndarray) else content
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )
