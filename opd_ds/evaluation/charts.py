"""Small charts as inline SVG, drawn by matplotlib (the extra `plots`). Numbers come from results, names are escaped."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:  # it takes most of a second, and is an extra
    from matplotlib.figure import Figure

HOW_TO_GET_CHARTS = "charts need matplotlib: pip install 'opd-ds[plots]'"
_POINTS = 400  # per curve
_WIDTH = 460  # of a chart, in pixels of the page at its natural size
_INK, _SOFT, _LINE = "#1d2530", "#5b6675", "#dfe3e8"  # of the page, see report.html.j2
_STYLE: Any = {  # keys of matplotlib's rcParams
    "svg.fonttype": "none",  # text stays text: small files, and the page's font
    "text.parse_math": False,  # a name may hold dollars
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "grid.color": _LINE,
    "grid.linewidth": 1,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
}

# Identifiers such as axes_1, which every chart would have, the rule for all elements of the page, and the font, which
# is the page's.
_LEFT_OUT = re.compile(
    r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|(?<=<g) id=\"[\w.]+\"|font-family: [^;]*; |"
    r" transform=\"rotate\(-0[^\"]*\"|(?<=\n)\s+",
    re.DOTALL,
)


@dataclass(frozen=True)
class Bar:
    """A value with its interval; None where there is none."""

    name: str
    colour: str
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curve:
    """y over x; both of one length."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def bars(title: str, entries: list[Bar]) -> Markup:
    """Horizontal bars with intervals as whiskers, from 0, to the left where they are negative; the axis leaves 0 out
    only where it would hide the differences.
    """
    ends = [end for entry in entries for end in (entry.low, entry.high, entry.value) if end is not None]
    start, stop = _span(min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.18 * (stop - start)  # space for the values
    with _figure(26 * len(entries) + 30) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        axes.set_yticks(range(len(entries)), [_cut(entry.name, 22) for entry in entries], color=_INK)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlim(start - margin * (start < 0), stop + margin * (stop > 0))
        for place, entry in enumerate(entries):
            if entry.value is None:
                axes.annotate("not measured", (start, place), (4, 0), textcoords="offset points", va="center")
                continue
            origin = min(max(start, 0.0), stop)
            axes.barh(place, entry.value - origin, 0.62, origin, color=entry.colour)
            edges = [entry.value]
            if entry.low is not None and entry.high is not None:
                axes.plot([entry.low, entry.high], [place, place], color=_INK, linewidth=1.3, marker="|")
                edges += [entry.low, entry.high]
            edge, away, side = (min(edges), -6, "right") if entry.value < 0 else (max(edges), 6, "left")
            axes.annotate(
                f"{entry.value:.3f}", (edge, place), (away, 0), textcoords="offset points", va="center", ha=side
            )
        if start > 0 or stop < 0:
            figure.text(0.01, 0.02, "axis not from 0", color=_SOFT)
        said = "; ".join(f"{e.name} {'not measured' if e.value is None else f'{e.value:.3f}'}" for e in entries)
        return _svg(figure, f"{title}: {said}")


def _span(low: float, high: float) -> tuple[float, float]:
    """Begin and end of an axis for values from `low` to `high`: with 0, unless they lie close together far from it.
    Then it is longer than a hundredth of their size, so that smaller differences stay small.
    """
    room = max(0.15 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-9)
    start = 0.0 if 0 <= low <= 0.8 * high else low - room * (low > 0)
    stop = 0.0 if 0.8 * low <= high <= 0 else high + room * (high < 0)
    if high == low:
        start, stop = min(0.0, low), max(0.0, high)
    return start, stop if stop > start else start + 1.0


def radar(axes: list[str], entries: list[Bar], values: dict[str, list[float]]) -> Markup:
    """One polygon per model; `values` are in [0, 1], one per axis. Needs three axes."""
    angles = [2 * math.pi * place / len(axes) for place in range(len(axes))]
    with _figure(270) as figure:
        polar: Any = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
        polar.set_xticks(angles, [_cut(name, 24) for name in axes])
        polar.set_yticks([0.25, 0.5, 0.75, 1.0], [""] * 4)
        polar.set_ylim(0, 1)
        polar.tick_params(pad=10)
        polar.spines["polar"].set_visible(False)
        for entry in entries:
            closed = [*values[entry.name], values[entry.name][0]]
            polar.plot([*angles, angles[0]], closed, color=entry.colour, linewidth=2)
            polar.fill(angles, values[entry.name], color=entry.colour, alpha=0.08)
        said = "; ".join(f"{e.name} " + ", ".join(f"{v:.2f}" for v in values[e.name]) for e in entries)
        return _svg(figure, f"Each metric from the worst (0) to the best (1) model: {said}")


def curves(title: str, entries: list[Curve]) -> Markup:
    """Lines over rounds; the y axis is logarithmic when positive values span more than a factor of 20."""
    kept = [entry for entry in map(_thinned, entries) if entry.x]
    ys = [value for entry in kept for value in entry.y]
    if not ys:
        return Markup("")
    with _figure(200) as figure:
        axes = figure.add_subplot(xlabel="round")
        axes.grid(axis="x", visible=False)
        axes.xaxis.label.set_color(_SOFT)
        for entry in kept:
            axes.plot(entry.x, entry.y, color=entry.colour, linewidth=1.6)
        if min(ys) > 0 and max(ys) > 20 * min(ys):
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=min(0.0, *ys))
        said = "; ".join(f"{e.name} from {e.y[0]:.3g} to {e.y[-1]:.3g}" for e in kept)
        return _svg(figure, f"{title}: {said}")


# ---- parts ----


@contextmanager
def _figure(height: int) -> Iterator[Figure]:
    """An empty figure; inside, what is drawn has the page's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure((_WIDTH / 72, height / 72), layout="constrained")  # a point of the SVG is a pixel of the page


def _thinned(curve: Curve) -> Curve:
    """Finite points, at most `_POINTS`, the last always among them."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    step = -(-len(points) // _POINTS) or 1
    points = points[::-1][::step][::-1]
    return Curve(curve.name, curve.colour, [x for x, _ in points], [y for _, y in points])


def _cut(text: str, length: int) -> str:
    """Without its middle where it is too long: names often differ in their ends."""
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def _svg(figure: Figure, said: str) -> Markup:
    """The figure as an element of a page; `said` is what a screen reader reads."""
    import matplotlib

    stream = io.StringIO()
    # Identifiers of clip paths and markers are hashes: salted, they differ between the charts of a page, and are the
    # same each time.
    with matplotlib.rc_context({"svg.hashsalt": said}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    inner = stream.getvalue().partition("<svg")[2].partition(">")[2]
    inner = _LEFT_OUT.sub("", inner)
    width, height = figure.get_size_inches() * 72
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(said)}">'
    return Markup(head + inner)
