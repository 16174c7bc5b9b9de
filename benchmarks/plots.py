"""The bench's pictures, each with the numbers behind it as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.drawing import Bars, Line, Panel, draw
from benchmarks.table import WITH_TEACHERS, Findings, Point, write_csv
from opd_ds.miniature.world import TASKS

_MILLION_UNITS = "million pass units (forward + 2 x backward)"
Curves = dict[tuple[str, str], list[Point]]  # by name and seed


def draw_all(findings: Findings, methods: dict[str, Any], folder: Path) -> None:
    """`methods`: as in summary.json."""
    _curves(
        {(name, str(seed)): curve for (name, seed), curve in findings.curves.items()}, folder / "reward_against_passes"
    )
    _curves({(kind, ""): curve for kind, curve in findings.convergence.items()}, folder / "ode_sde")
    _methods({name: found for name, found in methods.items() if name != WITH_TEACHERS}, folder / "methods")
    _gradients(findings.gradients, folder / "gradient_variance")


def _curves(curves: Curves, place: Path) -> None:
    lines: list[dict[str, Any]] = []
    for (name, seed), curve in curves.items():
        for point in curve:
            cost = {"passes": point.passes.total, "pass_units": point.passes.units}
            lines += [{"name": name, "seed": seed, "task": t, **cost, "reward": r} for t, r in point.rewards.items()]
    write_csv(place.with_suffix(".csv"), lines)
    panels = [
        Panel(
            task,
            _MILLION_UNITS,
            [
                Line(name, [p.passes.units / 1e6 for p in curve], [p.rewards[task] for p in curve])
                for (name, _), curve in curves.items()
            ],
        )
        for task in TASKS
    ]
    draw(panels, place.with_suffix(".png"))


def _methods(methods: dict[str, Any], place: Path) -> None:
    lines = [
        {"method": name, "task": task, **found["tasks"][task]} for name, found in methods.items() for task in TASKS
    ]
    write_csv(place.with_suffix(".csv"), lines)
    bars = [
        Bars(name, [found["tasks"][task]["mean"] for task in TASKS], [found["tasks"][task]["spread"] for task in TASKS])
        for name, found in methods.items()
    ]
    half = "mean reward on held-out prompts"
    average = [
        Bars(bar.name, [methods[bar.name]["average"]], [None])
        for bar in bars
        if methods[bar.name]["average"] is not None
    ]
    draw(
        [Panel(half, "", bars, TASKS), Panel("min-max normalised average", "", average, ["average"])],
        place.with_suffix(".png"),
    )


def _gradients(report: dict[str, Any], place: Path) -> None:
    keys = ("mean_norm2", "variance", "noise_variance")
    lines = [
        {
            "step": entry["step"],
            "sigma": entry["sigma"],
            **{f"{kind}_{key}": entry[kind][key] for kind in ("closed_form", "ppo") for key in keys},
            **{key: entry[key] for key in ("ratio", "distance2", "distance2_expected")},
        }
        for entry in report["steps"]
    ]
    write_csv(place.with_suffix(".csv"), lines)
    steps = [entry["step"] for entry in report["steps"]]
    names = {"closed form": "closed_form", "PPO-style": "ppo"}
    variances = [
        Line(name, steps, [entry[kind]["variance"] for entry in report["steps"]]) for name, kind in names.items()
    ]
    ratio = [Line("PPO-style / closed form", steps, [entry["ratio"] for entry in report["steps"]])]
    panels = [
        Panel("total variance of the gradient", "step, from noise to picture", variances, logarithmic=True),
        Panel("ratio of the variances", "step, from noise to picture", ratio, logarithmic=True),
    ]
    draw(panels, place.with_suffix(".png"))
