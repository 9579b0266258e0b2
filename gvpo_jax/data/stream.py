"""Rows that are read while training goes on: for data that does not fit into memory."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gvpo_jax.data.encoding import Encoder
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.data.rows import PlacedRow, as_row, check_row, shuffled
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.parallel.distributed import raise_together

HEAD = 256  # rows that are looked at before training


class RowStream:
    """Rows that can be read from their beginning as often as wanted.

    Args:
        read: gives them, from the first on.
    """

    def __init__(self, read: Callable[[], Iterator[Any]]):
        self._read = read

    @explained_by(Page.ROWS)
    def head(self) -> list[PlacedRow]:
        """The first ones.

        Raises:
            UserError: there is none, or one can't be used.
        """
        rows = list(itertools.islice(self, HEAD))
        if not rows:
            raise UserError("there are no rows; give at least one with a prompt")
        return rows

    def __iter__(self) -> Iterator[PlacedRow]:
        for number, row in enumerate(self._read(), start=1):
            placed = as_row(row, number)
            check_row(placed.place, placed)
            yield placed


def as_stream(dataset: Any) -> RowStream:
    """A stream of an `IterableDataset`, a list, or a function that makes a generator.

    Raises:
        UserError: it is none of these, or can be read once only.
    """
    if isinstance(dataset, RowStream):
        return dataset
    if isinstance(dataset, Iterator):
        raise UserError(
            f"data.streaming reads the rows anew where a run goes on, and a "
            f"{type(dataset).__name__} gives them once: give the function that makes it"
        )
    if callable(dataset) and not hasattr(dataset, "__iter__"):
        return RowStream(lambda: _made(dataset))
    if isinstance(dataset, Mapping | str | bytes) or not hasattr(dataset, "__iter__"):
        raise UserError(
            "data.streaming takes an IterableDataset, or a function that makes a generator of "
            f"rows; this is a {type(dataset).__name__}"
        )
    rows: Any = dataset
    return RowStream(lambda: iter(rows))


def _made(make: Callable[..., Any]) -> Iterator[Any]:
    """What a user's function gives."""
    try:
        return iter(make())
    except TypeError as error:  # it has arguments, or gives nothing to iterate over
        name = getattr(make, "__name__", type(make).__name__)
        raise UserError(
            f"{name} should take no arguments and give the rows one after the other: {error}"
        ) from error


class Order(NamedTuple):
    """In which order rows are taken: by `seed` out of a buffer of so many; 0: as they come."""

    seed: int
    buffer: int


class StreamedPrompts:
    """Prompts as training takes them one batch after the other; see `EncodedPrompts`.

    A row's number is its place in this order, over all epochs. It depends on the rows, the seed and
    the buffer alone: a run that goes on reads on from there, and several processes read alike.

    Args:
        stream: the rows.
        encoder: makes token ids of them.
        head: its first rows, encoded.
        order: in which they are taken.
        longest: tokens of a prompt, at most.

    Attributes:
        rows: the rows of the last `visit`, by their numbers.
        token_ids: their prompts.
        columns: names of the first rows' columns, which reward functions are given.
    """

    def __init__(
        self, stream: RowStream, encoder: Encoder, head: EncodedPrompts, order: Order, longest: int
    ):
        self._stream, self._encoder, self._order = stream, encoder, order
        self.head, self.columns, self.longest = head, head.columns, longest
        self.rows: dict[int, PlacedRow] = {}
        self.token_ids: dict[int, list[int]] = {}
        self._at, self._read, self._left_out = 0, iter(()), 0

    def fingerprint(self) -> str:
        """That of the first rows: the others are not known."""
        return self.head.fingerprint()

    @explained_by(Page.STREAMING)
    def visit(self, numbers: Sequence[int], size: int) -> tuple[list[np.ndarray], list[int]]:
        """The rows of these batches, which follow each other.

        Args:
            numbers: of the batches.
            size: rows of one.

        Returns:
            Of each batch its rows' numbers `[size]`; and how many rows before each of them were
            left out, since their prompts are too long.

        Raises:
            UserError: a row can't be read or used, on whichever process.
        """
        return raise_together(lambda: self._visit(numbers, size))

    def _visit(self, numbers: Sequence[int], size: int) -> tuple[list[np.ndarray], list[int]]:
        first = numbers[0] * size
        if first < self._at or not self._at:
            self._at, self._read, self._left_out = 0, self._taken(), 0
        self.rows, self.token_ids = {}, {}
        while self._at < first:
            next(self._read)
            self._at += 1
        batches, left_out = [], []
        for number in numbers:
            before = self._left_out
            places = np.arange(number * size, (number + 1) * size)
            for place in places:
                row, ids = next(self._read)
                self.rows[int(place)] = row
                self.token_ids[int(place)] = ids or self._encoder.ids(row) or []
                self._at += 1
            batches.append(places)
            left_out.append(self._left_out - before)
        return batches, left_out

    def _taken(self) -> Iterator[tuple[PlacedRow, list[int] | None]]:
        """All rows whose prompts fit, epoch after epoch; with token ids where that had to be known.

        So a run that goes on passes over the earlier rows faster.
        """
        for epoch in itertools.count():
            nothing = True
            for row in _mixed(iter(self._stream), self._order, epoch):
                ids = self._encoder.ids(row) if self._encoder.leaves_out else None
                if ids is None and self._encoder.leaves_out:
                    self._left_out += 1
                    continue
                nothing = False
                yield row, ids
            if nothing:
                raise UserError(f"no prompt of the stream has at most {self.longest} tokens")


def _mixed(rows: Iterator[PlacedRow], order: Order, epoch: int) -> Iterator[PlacedRow]:
    """Each row takes the place of one in the buffer, which is given out; at the end, the others."""
    if not order.buffer:
        yield from rows
        return
    # Raw bits keep their values across NumPy versions, see `shuffled`.
    draw = np.random.PCG64(np.random.SeedSequence((order.seed, epoch)))
    buffer = list(itertools.islice(rows, order.buffer))
    for row in rows:
        place = int(draw.random_raw()) % order.buffer
        buffer[place], given = row, buffer[place]
        yield given
    for place in shuffled(len(buffer), order.seed, epoch):
        yield buffer[place]
