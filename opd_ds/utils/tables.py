"""Tables for terminals: what is too wide stands below, not cut off."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

_NAME = 24  # characters of a name before it is folded
_GAP, _EDGES = 2, 3  # characters between columns, one of them the box's, and at both ends of a line


def fitting(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[Table]:
    """One table, or several below one another that each begin with the first column again, none wider than `width`.

    Columns but the first are numbers: they are aligned right and never cut; long names are folded.
    """
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    widths = [max(cells, min(len(name), _NAME)) for cells, name in zip(widths, head, strict=True)]
    first = min(widths[0], _NAME)
    groups: list[list[int]] = [[]]
    used = first + _EDGES
    for place in range(1, len(head)):
        needed = widths[place] + _GAP
        if groups[-1] and used + needed > width:
            groups.append([])
            used = first + _EDGES
        groups[-1].append(place)
        used += needed
    return [_table(head, rows, [0, *group], [first, *(widths[place] for place in group)]) for group in groups]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], places: list[int], widths: list[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for place, width in zip(places, widths, strict=True):
        table.add_column(head[place], justify="right" if place else "left", width=width, overflow="fold")
    for row in rows:
        table.add_row(*(row[place] for place in places))
    return table
