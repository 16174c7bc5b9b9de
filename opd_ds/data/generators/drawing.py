"""Drawing numbered items without repetition, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def digits(index: int, *sizes: int) -> list[int]:
    """`index` in mixed radix: one digit below each of `sizes`, the last one changing fastest."""
    found = []
    for size in reversed(sizes):
        index, digit = divmod(index, size)
        found.append(digit)
    return found[::-1]


def two_of(index: int, count: int) -> tuple[int, int]:
    """The pair number `index` of two different numbers below `count`, of count * (count - 1) pairs."""
    first, second = digits(index, count, count - 1)
    return first, second + (second >= first)


def shuffled(size: int, generator: Random) -> Iterator[int]:
    """All numbers below `size` in random order; a prefix costs little where it is short.

    Of `random` only `Random.random` promises the same numbers in every version of Python.
    """
    seen: set[int] = set()
    while len(seen) < size:
        index = int(generator.random() * size)
        if index not in seen:
            seen.add(index)
            yield index
