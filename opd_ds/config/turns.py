"""Which tasks a round trains: all of them, one in turn, or one that is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Literal

TaskSchedule = Literal["together", "alternate", "random"]


def tasks_of_round(schedule: TaskSchedule, turns: Mapping[str, int], seed: int, index: int) -> list[str]:
    """The tasks of round `index`, counted from 0.

    Args:
        turns: of each task, rounds in a row where tasks alternate, and in parts of all turns its share of the rounds
            where they are drawn.
    """
    if schedule == "together":
        return list(turns)
    if schedule == "alternate":
        cycle = _cycle(turns)
        return [cycle[index % len(cycle)]]
    return [_drawn(tuple(turns.items()), seed).upto(index + 1)[index]]


def rounds_before(schedule: TaskSchedule, turns: Mapping[str, int], seed: int, index: int, task: str) -> int:
    """How many rounds before round `index` train `task`."""
    if schedule == "together":
        return index
    if schedule == "alternate":
        cycle = _cycle(turns)
        cycles, place = divmod(index, len(cycle))
        return cycles * turns[task] + cycle[:place].count(task)
    return _drawn(tuple(turns.items()), seed).upto(index)[:index].count(task)


def _cycle(turns: Mapping[str, int]) -> list[str]:
    return list(Counter(turns).elements())


class _DrawnTasks:
    """One task a round, named by seed and round; kept as far as it was asked for, as a round asks for all before it."""

    def __init__(self, turns: Mapping[str, int], seed: int) -> None:
        self._names, self._ends, self._seed = list(turns), list(accumulate(turns.values())), seed
        self._rounds: list[str] = []

    def upto(self, count: int) -> list[str]:
        """The tasks of the first `count` rounds, or of more."""
        for index in range(len(self._rounds), count):
            draw = random.Random(f"{self._seed}/{index}/task")
            self._rounds += draw.choices(self._names, cum_weights=self._ends)
        return self._rounds


@lru_cache(maxsize=16)
def _drawn(turns: tuple[tuple[str, int], ...], seed: int) -> _DrawnTasks:
    return _DrawnTasks(dict(turns), seed)
