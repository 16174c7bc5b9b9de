"""Many values in little memory: as bytes one after the other, made when they are asked for."""

from __future__ import annotations

import mmap
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import eq
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")

_IN_MEMORY = (
    64 * 2**20
)  # bytes; above that they go to a file without a name, of which the page cache keeps what is read
_WRITTEN_AT_ONCE = 2**20  # bytes


class Packed(Sequence[Value]):
    """Equal to any sequence of equal values.

    Args:
        buffer: the values' bytes.
        ends: where each begins, and the last ends.
    """

    def __init__(self, unpack: Callable[[bytes], Value], buffer: bytes | mmap.mmap, ends: array[int]) -> None:
        self._unpack, self._buffer, self._ends = unpack, buffer, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Packed[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | Packed[Value]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a step of {step}: packed values are cut into neighbours only")
            return Packed(self._unpack, self._buffer, self._ends[start : max(start, stop) + 1])
        place = range(len(self))[index]
        return self._unpack(self._buffer[self._ends[place] : self._ends[place + 1]])

    def __iter__(self) -> Iterator[Value]:
        for start, end in pairwise(self._ends):
            yield self._unpack(self._buffer[start:end])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


class Packer(Generic[Value]):
    """Takes values one by one."""

    def __init__(self, pack: Callable[[Value], bytes], unpack: Callable[[bytes], Value]) -> None:
        self._pack, self._unpack = pack, unpack
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  # what is made of it keeps it
        self._unwritten = bytearray()
        self._ends = array("Q", [0])

    def append(self, value: Value) -> None:
        packed = self._pack(value)
        self._ends.append(self._ends[-1] + len(packed))
        self._unwritten += packed
        if len(self._unwritten) > _WRITTEN_AT_ONCE:
            self._write()

    def _write(self) -> None:
        self._file.write(self._unwritten)
        self._unwritten.clear()

    def done(self) -> Packed[Value]:
        """All of them; nothing may be appended any more."""
        self._write()
        size = self._ends[-1]
        if size > _IN_MEMORY:
            self._file.flush()
            return Packed(self._unpack, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self._ends)
        self._file.seek(0)
        return Packed(self._unpack, self._file.read(), self._ends)


def texts() -> Packer[str]:
    return Packer(str.encode, bytes.decode)


def mappings() -> Packer[dict[str, Any]]:
    """Of this process's own objects; those without entries take no bytes."""
    return Packer(lambda value: pickle.dumps(value) if value else b"", lambda data: pickle.loads(data) if data else {})
