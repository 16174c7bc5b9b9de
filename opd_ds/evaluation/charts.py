"""Small charts as inline SVG. Numbers come from results, names are escaped; colours and fonts belong to the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_POINTS = 400  # per curve


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


def bars(title: str, entries: list[Bar]) -> Markup:
    """Horizontal bars with intervals as whiskers. They start at 0 unless that would hide the differences."""
    width, row, left, right, top = 460, 26, 150, 58, 6
    known = [entry for entry in entries if entry.value is not None and entry.low is not None and entry.high is not None]
    ends = [end for entry in known for end in (entry.low, entry.high, entry.value) if end is not None]
    ends += [entry.value for entry in entries if entry.value is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    start = 0.0 if low >= 0 and low <= 0.8 * high else low - 0.15 * (high - low or 1.0)
    ticks = _ticks(start, high)
    stop = max(high, ticks[-1]) if high > start else start + 1.0

    def x(value: float) -> float:
        return left + (value - start) / (stop - start) * (width - left - right)

    height = top + row * len(entries) + 22
    parts = []
    for tick in ticks:
        parts.append(_line(x(tick), top, x(tick), height - 20, "grid"))
        parts.append(_text(x(tick), height - 6, _short(tick), "tick", "middle"))
    if start > 0:
        parts.append(_text(4, height - 6, "axis not from 0", "tick"))
    for place, entry in enumerate(entries):
        middle = top + row * (place + 0.5)
        parts.append(_text(left - 8, middle + 4, _cut(entry.name, 22), "name", "end"))
        if entry.value is None:
            parts.append(_text(left + 4, middle + 4, "not measured", "tick"))
            continue
        origin, end = x(max(start, min(0.0, stop))), x(entry.value)
        parts.append(
            f'<rect x="{min(origin, end):.1f}" y="{middle - 8:.1f}" width="{abs(end - origin):.1f}" height="16" rx="2" '
            f'fill="{entry.colour}"/>'
        )
        edge = end
        if entry.low is not None and entry.high is not None:
            parts.append(_line(x(entry.low), middle, x(entry.high), middle, "whisker"))
            parts += [_line(x(end), middle - 4, x(end), middle + 4, "whisker") for end in (entry.low, entry.high)]
            edge = max(edge, x(entry.high))
        parts.append(_text(edge + 6, middle + 4, f"{entry.value:.3f}", "value"))
    said = "; ".join(f"{e.name} {'not measured' if e.value is None else f'{e.value:.3f}'}" for e in entries)
    return _svg(width, height, f"{title}: {said}", parts)


def radar(axes: list[str], entries: list[Bar], values: dict[str, list[float]]) -> Markup:
    """One polygon per model; `values` are in [0, 1], one per axis. Needs three axes."""
    width, height, radius = 460, 270, 105
    cx, cy = width / 2, height / 2 + (20 if len(axes) == 3 else 0)

    def point(axis: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(axes) - math.pi / 2
        return cx + radius * value * math.cos(angle), cy + radius * value * math.sin(angle)

    parts = []
    for ring in (0.25, 0.5, 0.75, 1.0):
        parts.append(_polygon([point(axis, ring) for axis in range(len(axes))], 'class="ring"'))
    for axis, name in enumerate(axes):
        parts.append(_line(cx, cy, *point(axis, 1.0), "grid"))
        px, py = point(axis, 1.13)
        anchor = "middle" if abs(px - cx) < 12 else "start" if px > cx else "end"
        parts.append(_text(px, py + 4, _cut(name, 24), "tick", anchor))
    for entry in entries:
        corners = [point(axis, value) for axis, value in enumerate(values[entry.name])]
        style = f'fill="{entry.colour}" fill-opacity="0.08" stroke="{entry.colour}" stroke-width="2"'
        parts.append(_polygon(corners, style))
    said = "; ".join(f"{e.name} " + ", ".join(f"{v:.2f}" for v in values[e.name]) for e in entries)
    return _svg(width, height, f"Each metric from the worst (0) to the best (1) model: {said}", parts)


def curves(title: str, entries: list[Curve]) -> Markup:
    """Lines over rounds; the y axis is logarithmic when positive values span more than a factor of 20."""
    width, height, left, right, top, bottom = 460, 200, 52, 10, 8, 24
    kept = [_thinned(entry) for entry in entries]
    kept = [entry for entry in kept if entry.x]
    ys = [value for entry in kept for value in entry.y]
    xs = [value for entry in kept for value in entry.x]
    if not ys:
        return Markup("")
    logarithmic = min(ys) > 0 and max(ys) > 20 * min(ys)

    def scale(value: float) -> float:
        return math.log10(value) if logarithmic else value

    low, high = scale(min(ys)), scale(max(ys))
    if not logarithmic:
        low = min(low, 0.0)
    ticks = [float(t) for t in range(math.ceil(low), math.floor(high) + 1)] if logarithmic else _ticks(low, high)
    high = max([high, *ticks])
    span_x, span_y = max(xs) - min(xs) or 1.0, high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - min(xs)) / span_x * (width - left - right),
            height - bottom - (scale(y) - low) / span_y * (height - top - bottom),
        )

    parts = []
    for tick in ticks:
        y = height - bottom - (tick - low) / span_y * (height - top - bottom)
        parts.append(_line(left, y, width - right, y, "grid"))
        parts.append(_text(left - 6, y + 4, _short(10**tick if logarithmic else tick), "tick", "end"))
    for end, anchor in ((min(xs), "start"), (max(xs), "end")):
        parts.append(_text(place(end, ys[0])[0], height - 6, f"round {_short(end)}", "tick", anchor))
    for entry in kept:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(a, b) for a, b in zip(entry.x, entry.y, strict=True)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{entry.colour}" stroke-width="1.6"/>')
    said = "; ".join(f"{e.name} from {e.y[0]:.3g} to {e.y[-1]:.3g}" for e in kept)
    return _svg(width, height, f"{title}: {said}", parts)


# ---- parts ----


def _thinned(curve: Curve) -> Curve:
    """Finite points, at most `_POINTS`, the last always among them."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    step = -(-len(points) // _POINTS) or 1
    points = points[::-1][::step][::-1]
    return Curve(curve.name, curve.colour, [x for x, _ in points], [y for _, y in points])


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to at or just beyond `high`."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.1e}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _polygon(corners: list[tuple[float, float]], style: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}" {style} fill-rule="nonzero"/>'


def _svg(width: int, height: int, said: str, parts: list[str]) -> Markup:
    inner = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">{inner}</svg>')
