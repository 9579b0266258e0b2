"""Files of data: which ones a setting names, and what they hold."""

import codecs
import contextlib
import csv
import glob
import gzip
import importlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gvpo_jax.errors import UserError
from gvpo_jax.settings import check_path

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
_AT_A_TIME = 1024  # rows of a Parquet file


class NoSuchFile(UserError):
    """There is nothing where a setting says; the message begins with the path."""


@contextlib.contextmanager
def named_by(setting: str) -> Iterator[None]:
    """Where a file is not there, the message begins with the setting that names it."""
    try:
        yield
    except NoSuchFile as error:
        raise NoSuchFile(f"{setting}={error}", page=error.page) from None


def read_files(path: Path) -> Iterator[tuple[str, Any]]:
    """What a file, or those of a folder or pattern, hold: each row's place, and what stands there.

    They are read as they are asked for.

    Raises:
        UserError: there is no such file, it is of another kind, is broken or holds nothing.
    """
    nothing = True
    for file in files_of(path):
        for row in _read(file):
            nothing = False
            yield row
    if nothing:
        raise UserError(f"{path}: the file holds no rows")


def set_name(file: Path) -> str:
    """A file's name without its ending and without the number that `datasets` gives a part."""
    name = file.name.lower()
    ending = next((x for x in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(x)), "")
    return re.sub(r"-\d{5}(-of-\d{5})?$", "", file.name[: len(file.name) - len(ending)])


def files_of(path: Path) -> list[Path]:
    """The file, or those of a folder or pattern in the order of their names.

    Raises:
        UserError: there is none in the folder, or of the pattern.
    """
    check_path(path, "data")
    if os.path.isdir(path):  # for it a name that is too long is one that is not there
        shown = [file for file in path.iterdir() if not file.name.startswith(".")]
        found = sorted(x for x in shown if x.name.lower().endswith(SUFFIXES))
        if not found:
            raise NoSuchFile(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        # A table beside rows, of statistics say, is none of them; a pattern takes it all the same.
        rows = [x for x in found if not x.name.lower().endswith((".csv", ".csv.gz"))]
        return rows or found
    if os.path.exists(path) or not glob.has_magic(str(path)):
        return [path]
    if not (found := sorted(map(Path, glob.glob(str(path), recursive=True)))):
        raise NoSuchFile(f"{path}: no file has a name of this pattern{_hint(path)}")
    return [file for file in found if not file.is_dir()]


def _hint(path: Path) -> str:
    several = "," in path.name
    return "; several files are a folder, or a pattern such as data/*.jsonl" if several else ""


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """What should be rows, each with its place, read as they are asked for.

    A `.json` file with an array is read in one piece.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise UserError(f"{path}: data files end in {', '.join(SUFFIXES)}{_hint(path)}")
    if not os.path.isfile(path):
        raise NoSuchFile(f"{path}: there is no such file{_hint(path)}")
    if name.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    plain = name.removesuffix(".gz")
    try:
        opened: Any = gzip.open if name.endswith(".gz") else open
        with opened(path, "rb") as file:
            if plain.endswith(".csv"):
                with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
                    yield from _read_csv(path, text)
            elif plain.endswith(".json") and not _begins_with_object(file):
                yield from _read_array(path, file.read())
            else:
                yield from _read_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read: {_one_line(error)}") from None


def _begins_with_object(file: IO[bytes]) -> bool:
    """Whether the first sign is that of an object; the file is at its start again."""
    start = b""
    while not start and (part := file.read(4096)):
        start = part.removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"{")


def _read_array(path: Path, content: bytes) -> Iterable[tuple[str, Any]]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array of objects: {_one_line(error)}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file is an array of objects, [{{...}}, {{...}}]")
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line.decode("utf-8-sig"))
        # JSONDecodeError and UnicodeDecodeError are ValueErrors
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not a JSON object on one line: {error}") from None


def _read_csv(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """The first line has the columns' names; all values are texts."""
    csv.field_size_limit(2**31 - 1)
    try:
        lines = csv.DictReader(file, strict=True)
        names = list(lines.fieldnames or [])
        if len(names) == 1 and ";" in names[0]:
            raise UserError(f"{path}: in CSV the values are separated by commas, not semicolons")
        odd = [name for name in names if names.count(name) > 1 or name != name.strip() or not name]
        if odd:
            raise UserError(
                f"{path}:1: the column {odd[0]!r} has no name, stands there twice, or has blanks "
                "around its name"
            )
        for row in lines:
            place = f"{path}:{lines.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{place}: the line has not as many values as the first one has columns "
                    f"({', '.join(names)}); a value with a comma or a line break needs quotes"
                )
            yield place, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as CSV: {_one_line(error)}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f'{path}: pyarrow is missing: pip install "gvpo-jax[parquet]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            parts = file.iter_batches(_AT_A_TIME)
            rows = itertools.chain.from_iterable(part.to_pylist() for part in parts)
            for number, row in enumerate(rows, start=1):
                yield f"{path}: row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise UserError(f"{path}: can't be read as parquet: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
