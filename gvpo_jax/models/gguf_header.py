"""A look at the header of a .gguf file before it is read: whether its counts fit into the file.

The `gguf` package believes them: it loops over as many values, and allocates as many bytes, as a
broken or forged file claims. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path

# Bytes of a value, by the number of its type; those of variable length are below.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
# No tokenizer has more texts, merges or scores; `gguf` takes some 30 s for so many.
_MOST = 2**20
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def check_header(path: Path) -> None:
    """Raise ValueError, with what is wrong, where the header does not fit into its file."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is shorter than a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()


class _Header:
    """Goes through a header, value by value."""

    def __init__(self, content: mmap.mmap):
        self._content, self._at = content, 0

    def check(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._u32()
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3, or its bytes are in another order")
        tensors, values = self._count(24, "tensors"), self._count(13, "values")
        for _ in range(values):
            self._text("a name")
            self._value(self._u32())
        for _ in range(tensors):
            name = self._text("a name")
            dimensions = self._u32()
            if dimensions > 4:
                raise ValueError(f"tensor {name} has {dimensions} dimensions, at most 4 make sense")
            self._bytes(8 * dimensions + 12)  # its shape, its type, and where it is

    def _value(self, kind: int) -> None:
        if kind in _SIZES:
            self._bytes(_SIZES[kind])
        elif kind == _TEXT:
            self._text("a text")
        elif kind == _ARRAY:
            self._array()
        else:
            raise ValueError(f"there is no type of values {kind}")

    def _array(self) -> None:
        kind = self._u32()
        if kind in _SIZES:
            self._bytes(_SIZES[kind] * self._count(_SIZES[kind], "numbers"))
        elif kind == _TEXT:
            for _ in range(self._count(8, "texts")):
                self._text("a text")
        else:
            raise ValueError(f"an array of values of type {kind} is not read")

    def _count(self, each: int, of_what: str) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._u64()
        if count > min(_MOST, self._left // each):
            raise ValueError(f"it claims {count} {of_what}, more than there can be")
        return count

    def _text(self, what: str) -> str:
        length = self._u64()
        if length > self._left:
            raise ValueError(f"{what} of {length} bytes goes past its end")
        return self._bytes(length).decode("utf-8")  # UnicodeDecodeError is a ValueError

    def _u32(self) -> int:
        return _U32.unpack(self._bytes(4))[0]

    def _u64(self) -> int:
        return _U64.unpack(self._bytes(8))[0]

    @property
    def _left(self) -> int:
        return len(self._content) - self._at

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError("it ends within its header")
        self._at += count
        return self._content[self._at - count : self._at]
