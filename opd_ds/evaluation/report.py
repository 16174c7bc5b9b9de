"""report.html: one file that opens anywhere, from results.json, the images, and metrics.jsonl where there is one.

Images and clips are embedded as WebP thumbnails (clips as ones that play) in one block of data; the page hands one to
the browser only while its row is near the window, so a thousand of them cost neither decoding time nor memory.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_ds.evaluation.charts import HOW_TO_GET_CHARTS, Bar, Curve, bars, can_draw, curves, radar
from opd_ds.evaluation.clips import FRAMES, as_webp, frames_of, thumbnail
from opd_ds.evaluation.results import Results, averaged_metrics, interval_widths, means_of, metric_title, own_metrics
from opd_ds.evaluation.statistics import normalised_columns
from opd_ds.evaluation.store import PictureStore

REPORT_FILE = "report.html"
PICTURES = 1000  # embedded at most; more prompts are in the tables, not in the grid
_CLIP_COSTS = FRAMES // 4  # images: most of a clip's frames are stored as what changes
_SIDE = 256  # of a thumbnail, in pixels
_EXTREMES = 3  # best and worst prompts shown per model and metric
# Told apart without colour vision, too (after Okabe and Ito); base is grey, the student blue.
_GREY, _BLUE = "#8b929c", "#1b62b5"
_PALETTE = ("#d9822b", "#2e9e7c", "#b15aa6", "#c2a01e", "#57a6cf", "#a3542f", "#5d6bb0", "#7d8f2f")


@dataclass(frozen=True)
class Score:
    """What one reward gave (mean over samples), and by how much that differs from the reference's image."""

    label: str
    value: float
    gain: float | None


@dataclass(frozen=True)
class Cell:
    """One model's image of a prompt: its place among the embedded images, and its scores, the headline first."""

    model: str
    picture: int
    scores: list[Score]


@dataclass(frozen=True)
class Row:
    """A prompt of the grid."""

    number: int
    prompt: str
    cells: list[Cell]


@dataclass(frozen=True)
class Extreme:
    """A prompt on which a model gained or lost most against the reference."""

    prompt_set: str
    number: int
    prompt: str
    gain: float


def write_report(folder: Path, results: Results, metrics: list[dict[str, Any]], limit: int = PICTURES) -> Path:
    """Write `folder`/report.html.

    Args:
        folder: the evaluation's, with `images/` beside.
        metrics: the rows of the run's metrics.jsonl, for the training curves.
        limit: images to embed, or a sixth as many clips; the best and worst prompts come first, then prompts in order.
    """
    reference = "base" if "base" in results["models"] else next(iter(results["models"]))
    with_charts = can_draw()
    extremes = {model: _extremes(results, model, reference) for model in results["models"] if model != reference}
    album = _Album(folder / "images", results)
    shows_clips = "frames" in results["settings"]
    if shows_clips:
        limit //= _CLIP_COSTS
    sets = [_grid(results, name, _chosen(results, name, extremes, limit), reference, album) for name in results["sets"]]
    environment = Environment(
        loader=PackageLoader("opd_ds.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("report.html.j2").render(
        title=folder.resolve().parent.name,
        results=results,
        colours=_colours(results),
        reference=reference,
        metrics=[
            {"title": metric_title(name, label), "chart": _bar_chart(results, name, label) if with_charts else None}
            for name, label in own_metrics(results)
        ],
        rows=_table(results),
        radar=_radar_chart(results) if with_charts else None,
        training=_training_charts(metrics) if with_charts else [],
        no_charts="" if with_charts else f"This report has no charts: {HOW_TO_GET_CHARTS}",
        extremes=_shown_extremes(extremes),
        sets=sets,
        pictures=album.pictures,
        pixelated=album.pixelated,
        shown="clips" if shows_clips else "images",
    )
    draft = folder / f".{REPORT_FILE}.writing"
    draft.write_text(text, encoding="utf-8")
    return draft.replace(folder / REPORT_FILE)


class _Album:
    """Thumbnails as data URIs, each embedded once."""

    def __init__(self, folder: Path, results: Results) -> None:
        self._store, self._results = PictureStore(folder), results
        self.pictures: list[str] = []
        self.pixelated = False

    def add(self, model: str, name: str, number: int) -> int:
        """The place of the first image or clip of prompt `number`."""
        drawn = self._store.read(Path(self._results["models"][model]["folder"], name, f"{number:05d}-0.png"))
        tiny = max(frames_of(drawn)[0].size) <= 64  # shown enlarged: neither scaled nor compressed with loss
        self.pixelated = self.pixelated or tiny
        data = as_webp(thumbnail(drawn, _SIDE), lossless=tiny)
        self.pictures.append(f"data:image/webp;base64,{base64.b64encode(data).decode()}")
        return len(self.pictures) - 1


# ---- what is shown ----


def _headline(results: Results, name: str) -> str | None:
    chosen = results["sets"][name]
    return next(iter(chosen["own"] or chosen["rewards"]), None)


def _extremes(results: Results, model: str, reference: str) -> list[Extreme]:
    """The largest losses and gains on each set's headline, worst first."""
    found = []
    for name, chosen in results["sets"].items():
        label = _headline(results, name)
        if label is None:
            continue
        ours, theirs = (results["scores"][which][name][label]["per_prompt"] for which in (model, reference))
        gains = [
            Extreme(name, number, prompt, a - b)
            for number, (prompt, a, b) in enumerate(zip(chosen["prompts"], ours, theirs, strict=True))
            if a is not None and b is not None
        ]
        gains.sort(key=lambda extreme: extreme.gain)
        found += [extreme for extreme in gains[:_EXTREMES] if extreme.gain < 0]
        found += [extreme for extreme in gains[-_EXTREMES:] if extreme.gain > 0]
    return found


def _shown_extremes(extremes: dict[str, list[Extreme]]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "best": sorted((e for e in found if e.gain > 0), key=lambda e: -e.gain)[: 2 * _EXTREMES],
            "worst": sorted((e for e in found if e.gain < 0), key=lambda e: e.gain)[: 2 * _EXTREMES],
        }
        for model, found in extremes.items()
    ]


def _chosen(results: Results, name: str, extremes: dict[str, list[Extreme]], limit: int) -> list[int]:
    """Numbers of the prompts that fit: extremes first, then in order; sorted."""
    per_pair = max(1, limit // (len(results["models"]) * len(results["sets"])))
    first = [e.number for found in extremes.values() for e in found if e.prompt_set == name]
    return sorted(list(dict.fromkeys([*first, *range(len(results["sets"][name]["prompts"]))]))[:per_pair])


def _grid(results: Results, name: str, numbers: list[int], reference: str, album: _Album) -> dict[str, Any]:
    chosen = results["sets"][name]
    labels = chosen["own"] or chosen["rewards"]

    def scores(model: str, number: int) -> list[Score]:
        found = []
        for label in labels:
            now, before = (results["scores"][m][name][label]["per_prompt"][number] for m in (model, reference))
            if now is not None:
                gain = None if model == reference or before is None else now - before
                found.append(Score(label, now, gain))
        return found

    rows = [
        Row(
            number,
            chosen["prompts"][number],
            [Cell(model, album.add(model, name, number), scores(model, number)) for model in results["models"]],
        )
        for number in numbers
    ]
    return {"name": name, "labels": labels, "total": len(chosen["prompts"]), "rows": rows}


def _table(results: Results) -> list[dict[str, Any]]:
    """One row per model; the best of each column is marked."""
    columns = own_metrics(results)
    means = {
        model: [by_set[name][label]["mean"] for name, label in columns] for model, by_set in results["scores"].items()
    }
    best = [max((m for m in column if m is not None), default=None) for column in zip(*means.values(), strict=True)]
    averages = results["normalised_average"]
    best_average = max((value for value in averages.values() if value is not None), default=None)
    return [
        {
            "model": model,
            "cells": [
                (results["scores"][model][name][label], top is not None and value == top)
                for (name, label), value, top in zip(columns, means[model], best, strict=True)
            ],
            "average": averages[model],
            "best_average": averages[model] is not None and averages[model] == best_average,
        }
        for model in results["models"]
    ]


# ---- charts ----


def _colours(results: Results) -> dict[str, str]:
    fixed = {"base": _GREY, "student": _BLUE}
    others = [model for model in results["models"] if model not in fixed]
    given = {model: _PALETTE[place % len(_PALETTE)] for place, model in enumerate(others)}
    return {model: fixed.get(model) or given[model] for model in results["models"]}


def _entries(results: Results, name: str, label: str) -> list[Bar]:
    colours = _colours(results)
    return [
        Bar(model, colours[model], entry["mean"], *entry["ci95"])
        for model, by_set in results["scores"].items()
        for entry in [by_set[name][label]]
    ]


def _bar_chart(results: Results, name: str, label: str) -> Markup:
    return bars(metric_title(name, label), _entries(results, name, label))


def _radar_chart(results: Results) -> Markup | None:
    """None with fewer than three metrics that tell the models apart."""
    metrics = averaged_metrics(results)
    kept, normalised = normalised_columns(means_of(results, metrics), interval_widths(results, metrics))
    if len(kept) < 3:
        return None
    colours = _colours(results)
    entries = [Bar(model, colours[model], None, None, None) for model in results["models"]]
    return radar([metric_title(*metrics[place]) for place in kept], entries, normalised)


def _training_charts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, per-task KL and gradient norm over rounds."""
    if not rows:
        return []
    tasks = [key for key in rows[0] if key.startswith("task/") and key.endswith("/kl")]
    groups = {"loss": ["loss"], "KL per task": tasks, "gradient norm": ["grad_norm"]}
    charts = []
    for title, keys in groups.items():
        lines = [
            Curve(
                key.removeprefix("task/").removesuffix("/kl"),
                _PALETTE[place % len(_PALETTE)] if len(keys) > 1 else _BLUE,
                [row["round"] for row in rows if key in row],
                [row[key] for row in rows if key in row],
            )
            for place, key in enumerate(keys)
        ]
        charts.append({"title": title, "lines": lines if len(lines) > 1 else [], "chart": curves(title, lines)})
    return charts
