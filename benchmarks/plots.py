"""Plots of the benchmarks, each as PNG with its numbers as CSV beside it; drawn by matplotlib, the extra `plots`."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from opd_ds.errors import UserError
from opd_ds.evaluation.charts import HOW_TO_GET_CHARTS, can_draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def require_plots() -> None:
    """Before hours of work: raises UserError where matplotlib is not installed."""
    if not can_draw():
        raise UserError(HOW_TO_GET_CHARTS)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure((4.5 * count, 3.8), dpi=110, layout="constrained")
    axes = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for one in axes:
        one.set_axisbelow(True)
        one.grid(axis="y", color="#dddddd")
    return figure, axes


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float]],
    spreads: Mapping[str, Sequence[float | None]] | None = None,
) -> None:
    """In each group one bar per name, with a whisker where its spread is known."""
    from matplotlib import colormaps

    width, colours = 0.8 / len(bars), colormaps["tab10" if len(bars) <= 10 else "tab20"]
    for place, (name, values) in enumerate(bars.items()):
        at = [group + (place - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(at, values, width, label=name, color=colours(place))
        for x, value, spread in zip(at, values, (spreads or {}).get(name, ()), strict=False):
            if spread is not None:
                axes.errorbar(x, value, spread, color="black", linewidth=1)
    axes.set_xticks(range(len(groups)), groups)


def write_png(figure: Figure, file: Path | BinaryIO) -> None:
    """With one legend for all panels, in which a name stands once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=4 * len(figure.axes) // 2)
    figure.savefig(file, format="png")


def write_csv(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """The keys of the first line are the columns."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
