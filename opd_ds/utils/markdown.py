"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    """A table that ends with a line break; a `|` in a cell is escaped.

    Args:
        text_columns: so many columns from the left are text; the others are numbers and are set to the right.
    """
    align = ["---" if column < text_columns else "---:" for column in range(len(head))]
    lines = [_escaped(head), align, *map(_escaped, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cells: Sequence[object]) -> list[str]:
    return [str(cell).replace("|", "\\|") for cell in cells]
