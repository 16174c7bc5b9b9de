"""What the runs of a bench found: rewards, passes and seconds by method and seed, and curves along runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.passes import measured_passes
from benchmarks.paper.plan import (
    BASE,
    CONVERGENCE,
    Plan,
    cascade,
    convergence,
    joint,
    opd,
    runs,
    teacher,
)
from opd_ds.errors import UserError
from opd_ds.evaluation.results import RESULTS_FILE, means, read_results
from opd_ds.miniature.world import TASKS
from opd_ds.plan.passes import Passes
from opd_ds.runs.monitor import METRICS_FILE, SCORES_FILE, read_metrics
from opd_ds.runs.setup import EVALUATION_FOLDER

COLUMNS = ("method", "seed", "task", "reward", "passes", "seconds")
WITH_TEACHERS = "opd+teachers"

Rewards = dict[str, float]  # by task


@dataclass(frozen=True)
class Outcome:
    """Where a method ended. `seed` is None where there is nothing random but the evaluation's fixed noise.

    `seconds` are those of its rounds, without start, evaluation and export.
    """

    method: str
    seed: int | None
    rewards: Rewards
    passes: Passes = field(default_factory=Passes)
    seconds: float = 0.0


@dataclass(frozen=True)
class Point:
    """Held-out rewards after so many passes."""

    passes: Passes
    rewards: Rewards


@dataclass(frozen=True)
class Findings:
    """All that tables, claims and plots are made of.

    Attributes:
        curves: by method and seed, from the base on.
        convergence: by kind of rollout, from the base on.
        gradients: the report of `gradients.py`.
        other_passes: runs whose passes are not those that the budget was made with.
    """

    outcomes: list[Outcome]
    curves: dict[tuple[str, int], list[Point]]
    convergence: dict[str, list[Point]]
    gradients: dict[str, Any]
    other_passes: list[str] = field(default_factory=list)


def collect(plan: Plan, folder: Path, real: Rewards | None, gradients: dict[str, Any]) -> Findings:
    """Read the finished runs of `plan` in `folder`."""
    base = means(read_results(folder / BASE / EVALUATION_FOLDER / RESULTS_FILE))["base"]
    start = Point(Passes(), {task: base[task][_label(task)] for task in TASKS})
    outcomes = [Outcome("base", None, start.rewards)]
    outcomes += [Outcome("real", None, real)] if real is not None else []
    curves: dict[tuple[str, int], list[Point]] = {}
    for seed in plan.seeds:
        teachers = [_outcome(f"teacher:{task}", seed, folder, [teacher(task, seed)]) for task in TASKS]
        student = _outcome("opd", seed, folder, [opd(seed)])
        everything = Outcome(
            WITH_TEACHERS,
            seed,
            student.rewards,
            sum((one.passes for one in teachers), student.passes),
            sum((one.seconds for one in teachers), student.seconds),
        )
        stages = {"joint": [joint(seed)], "cascade": cascade(seed)}
        others = [_outcome(method, seed, folder, names) for method, names in stages.items()]
        outcomes += [*teachers, student, everything, *others]
        for method, names in ({"opd": [opd(seed)]} | stages).items():
            curves[method, seed] = [start, *_curve(folder, names)]
    along = {kind: [start, *_curve(folder, [convergence(kind)])] for kind in CONVERGENCE}
    other = [run.name for run in runs(plan) if measured_passes(folder / run.name) != run.passes]
    return Findings(outcomes, curves, along, gradients, other)


def rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One for every method, seed and task: `COLUMNS`."""
    return [
        {
            "method": one.method,
            "seed": "" if one.seed is None else one.seed,
            "task": task,
            "reward": round(reward, 6),
            "passes": one.passes.total,
            "seconds": round(one.seconds, 1),
        }
        for one in outcomes
        for task, reward in one.rewards.items()
    ]


def _label(task: str) -> str:
    return f"miniature_{task}"


def _outcome(method: str, seed: int, folder: Path, names: list[str]) -> Outcome:
    """Of runs that go on from each other."""
    metrics = [row for name in names for row in read_metrics(folder / name / METRICS_FILE)]
    seconds = sum(value for row in metrics for key, value in row.items() if key.startswith("seconds/"))
    passes = sum((measured_passes(folder / name) for name in names), Passes())
    return Outcome(method, seed, _curve(folder, names)[-1].rewards, passes, seconds)


def _curve(folder: Path, names: list[str]) -> list[Point]:
    points, spent = [], Passes()
    for name in names:
        metrics = read_metrics(folder / name / METRICS_FILE)
        # A finished run that was started again has scored its last round twice.
        scored = {row["round"]: row for row in read_metrics(folder / name / SCORES_FILE)}
        if not metrics or metrics[-1]["round"] not in scored:
            raise UserError(f"{folder / name}: not the records of a whole run; remove this folder and start again")
        for row in metrics:
            spent += Passes(row["passes/forward"], row["passes/backward"])
            found = scored.get(row["round"])
            if found is not None:
                points.append(Point(spent, {task: found[f"{task}/{_label(task)}"] for task in TASKS}))
    return points
