"""The bench's images, each with the numbers behind it as CSV."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.paper.methods import WITH_TEACHERS, Queries
from benchmarks.paper.plan import FULL
from benchmarks.paper.table import SCORED, Findings, Outcome, Point, mean_of_tasks
from benchmarks.plots import grouped_bars, panels, write_csv, write_png

_MILLION_UNITS = "million pass units (forward + 2 x backward)"
Curves = dict[tuple[str, str], list[Point]]  # by name and seed


def draw_all(findings: Findings, methods: dict[str, Any], folder: Path) -> list[str]:
    """`methods`: as in summary.json. Returns the names of the images: parts that were not run have none."""
    known = {one.name: one for one in FULL.queries if isinstance(one, Queries)}
    asked = [(known[one.method], one) for one in findings.singles if one.method in known]
    curves = {(name, str(seed)): curve for (name, seed), curve in findings.curves.items()}
    noise = {(kind, ""): curve for kind, curve in findings.noise.items()}
    drawn = ["methods", "reward_against_passes"]
    _methods({name: found for name, found in methods.items() if name != WITH_TEACHERS}, folder / drawn[0])
    _curves(curves, folder / drawn[1])
    if asked:
        drawn.append("queries")
        _queries(asked, folder / drawn[-1])
    if noise:
        drawn.append("noise")
        _curves(noise, folder / drawn[-1])
    drawn.append("gradient_variance")
    _gradients(findings.gradients, folder / drawn[-1])
    return [f"{name}.png" for name in drawn]


def _curves(curves: Curves, place: Path) -> None:
    lines: list[dict[str, Any]] = []
    for (name, seed), curve in curves.items():
        for point in curve:
            cost = {"passes": point.passes.total, "pass_units": point.passes.units}
            lines += [{"name": name, "seed": seed, "task": t, **cost, "reward": r} for t, r in point.rewards.items()]
    write_csv(place.with_suffix(".csv"), lines)
    figure, axes = panels(len(SCORED))
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in curves))}
    for one, task in zip(axes, SCORED, strict=True):
        one.set(title=task, xlabel=_MILLION_UNITS)
        for (name, _), curve in curves.items():
            units = [point.passes.units / 1e6 for point in curve]
            one.plot(units, [point.rewards[task] for point in curve], ".-", color=colours[name], label=name)
    write_png(figure, place.with_suffix(".png"))


def _methods(methods: dict[str, Any], place: Path) -> None:
    lines = [
        {"method": name, "task": task, **found["tasks"][task]} for name, found in methods.items() for task in SCORED
    ]
    write_csv(place.with_suffix(".csv"), lines)
    means, spreads = (
        {name: [found["tasks"][task][key] for task in SCORED] for name, found in methods.items()}
        for key in ("mean", "spread")
    )
    averages = {name: [math.nan if found["average"] is None else found["average"]] for name, found in methods.items()}
    figure, (left, right) = panels(2)
    left.set_title("mean reward on held-out prompts")
    grouped_bars(left, SCORED, means, spreads)
    right.set_title("min-max normalised average")
    grouped_bars(right, ["average"], averages)
    write_png(figure, place.with_suffix(".png"))


def _queries(found: list[tuple[Queries, Outcome]], place: Path) -> None:
    """One panel per schedule, one line per place, over the number of queries."""
    lines: list[dict[str, Any]] = [
        {"queries": one.count, "where": one.place, "schedule": one.schedule, **outcome.rewards}
        | {"mean": mean_of_tasks(outcome.rewards), "pass_units": outcome.passes.units}
        for one, outcome in found
    ]
    write_csv(place.with_suffix(".csv"), lines)
    schedules = list(dict.fromkeys(line["schedule"] for line in lines))
    figure, axes = panels(len(schedules))
    for one, schedule in zip(axes, schedules, strict=True):
        one.sharey(axes[0])
        one.set(title=f"tasks of an update: {schedule}", xlabel="queries a trajectory", ylabel="mean reward")
        one.set_xticks(sorted({line["queries"] for line in lines}))
        for number, where in enumerate(dict.fromkeys(line["where"] for line in lines)):
            own = [line for line in lines if (line["schedule"], line["where"]) == (schedule, where)]
            one.plot([o["queries"] for o in own], [o["mean"] for o in own], ".-", color=f"C{number}", label=where)
    write_png(figure, place.with_suffix(".png"))


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
    figure, (left, right) = panels(2)
    label = "step, from noise to image"
    left.set(title="total variance of the gradient", xlabel=label, yscale="log")
    for name, kind in {"closed form": "closed_form", "PPO-style": "ppo"}.items():
        left.plot(steps, [entry[kind]["variance"] for entry in report["steps"]], ".-", label=name)
    right.set(title="ratio of the variances", xlabel=label, yscale="log")
    ratios = [entry["ratio"] for entry in report["steps"]]
    right.plot(steps, ratios, ".-", color="C2", label="PPO-style / closed form")
    write_png(figure, place.with_suffix(".png"))
