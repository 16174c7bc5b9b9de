"""Charts as PNG, drawn with Pillow alone: panels side by side, with lines or groups of bars, and one legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_PALETTE = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22", "#e377c2")
_SMOOTH = 3  # drawn so many times larger, then reduced: Pillow's lines have hard edges
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 420, 300, 62, 14, 30, 44, 20


@dataclass(frozen=True)
class Line:
    """Lines of one name share a colour and an entry of the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Bars:
    """One bar in each group; `spread` None: no whisker."""

    name: str
    values: Sequence[float]
    spread: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    """`contents` are all lines or all bars; `groups` names the groups of bars."""

    title: str
    x_label: str
    contents: Sequence[Line] | Sequence[Bars]
    groups: Sequence[str] = ()
    logarithmic: bool = False


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Write `file`, a PNG."""
    names = list(dict.fromkeys(one.name for panel in panels for one in panel.contents))
    colours = {name: _PALETTE[place % len(_PALETTE)] for place, name in enumerate(names)}
    width = _WIDTH * len(panels)
    places, legend_height = _legend_places(names, width)
    sheet = _Sheet(width, _HEIGHT + legend_height)
    for number, panel in enumerate(panels):
        _panel(sheet, panel, number * _WIDTH, colours)
    for name, (x, y) in places.items():
        sheet.box(x, _HEIGHT + y + 4, x + 12, _HEIGHT + y + 14, colours[name])
        sheet.text(x + 17, _HEIGHT + y + 9, name, "lm")
    sheet.save(file)


class _Sheet:
    """Coordinates in pixels of the picture that is saved."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(size=12 * _SMOOTH)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        scaled = [(x * _SMOOTH, y * _SMOOTH) for x, y in points]
        self._draw.line(scaled, colour, max(1, round(width * _SMOOTH)), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self._draw.rectangle([left * _SMOOTH, top * _SMOOTH, right * _SMOOTH, bottom * _SMOOTH], colour)

    def dot(self, x: float, y: float, colour: str) -> None:
        self._draw.circle((x * _SMOOTH, y * _SMOOTH), 2.5 * _SMOOTH, colour)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._draw.text((x * _SMOOTH, y * _SMOOTH), text, "#222222", self._font, anchor)

    def save(self, file: Path) -> None:
        self._image.reduce(_SMOOTH).save(file)


@dataclass(frozen=True)
class _Axis:
    """Values to pixels: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        if self.logarithmic:
            return [10.0**k for k in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]
        span = (self.high - self.low) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 4 * 0.999)
        return [k * step for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _panel(sheet: _Sheet, panel: Panel, x0: int, colours: dict[str, str]) -> None:
    bottom, left, right = _HEIGHT - _BOTTOM, x0 + _LEFT, x0 + _WIDTH - _RIGHT
    vertical = _vertical(panel, bottom)
    sheet.text((left + right) / 2, _TOP / 2, panel.title, "mm")
    sheet.text((left + right) / 2, _HEIGHT - 10, panel.x_label, "mm")
    for tick in vertical.ticks:
        sheet.line([(left, vertical(tick)), (right, vertical(tick))], "#dddddd")
        sheet.text(left - 6, vertical(tick), f"{tick:.3g}", "rm")
    if panel.groups:
        _bars(sheet, panel, vertical, left, right, colours)
    else:
        _lines(sheet, panel, vertical, left, right, colours)
    sheet.line([(left, bottom), (right, bottom)], "#222222")


def _vertical(panel: Panel, bottom: float) -> _Axis:
    values = []
    for one in panel.contents:
        if isinstance(one, Line):
            values += list(one.y)
        else:
            spread = [part or 0.0 for part in one.spread]
            values += [value + part for value, part in zip(one.values, spread, strict=True)]
    low, high = min(values), max(values)
    if panel.logarithmic:
        return _Axis(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9), bottom, _TOP, True)
    return _Axis(min(0.0, low), high * 1.05 if high > 0 else 1.0, bottom, _TOP)


def _lines(sheet: _Sheet, panel: Panel, vertical: _Axis, left: float, right: float, colours: dict[str, str]) -> None:
    entries = [one for one in panel.contents if isinstance(one, Line)]
    across = [x for line in entries for x in line.x]
    horizontal = _Axis(min(across), max(across), left, right)
    for tick in horizontal.ticks:
        sheet.text(horizontal(tick), vertical.start + 12, f"{tick:.3g}", "mm")
    for line in entries:
        points = [(horizontal(x), vertical(y)) for x, y in zip(line.x, line.y, strict=True)]
        sheet.line(points, colours[line.name], 1.6)
        for point in points:
            sheet.dot(*point, colours[line.name])


def _bars(sheet: _Sheet, panel: Panel, vertical: _Axis, left: float, right: float, colours: dict[str, str]) -> None:
    entries = [one for one in panel.contents if isinstance(one, Bars)]
    group = (right - left) / len(panel.groups)
    width = 0.8 * group / len(entries)
    for number, name in enumerate(panel.groups):
        start = left + number * group + 0.1 * group
        sheet.text(start + 0.4 * group, vertical.start + 12, name, "mm")
        for place, bars in enumerate(entries):
            value, spread = bars.values[number], bars.spread[number]
            x = start + place * width
            sheet.box(x, vertical(value), x + width - 1, vertical.start, colours[bars.name])
            if spread:
                ends = [(x + width / 2, vertical(value - spread)), (x + width / 2, vertical(value + spread))]
                sheet.line(ends, "#222222")


def _legend_places(names: list[str], width: int) -> tuple[dict[str, tuple[float, float]], int]:
    """Where each entry begins, in as many rows as needed, and the legend's height."""
    font, places, x, y = ImageFont.load_default(size=12), {}, float(_LEFT), 0.0
    for name in names:
        length = 17 + font.getlength(name) + 18
        if x + length > width and x > _LEFT:
            x, y = float(_LEFT), y + _ROW
        places[name] = (x, y)
        x += length
    return places, int(y) + _ROW + 4
