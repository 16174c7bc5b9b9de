"""What the runs of a bench found: rewards, passes and seconds by method and seed, and curves along runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.paper.methods import CASCADE, JOINT, MERGED, STUDENT, WITH_TEACHERS
from benchmarks.paper.passes import measured_passes
from benchmarks.paper.plan import BASE, Plan, cascade, joint, merged_scores, runs, student, teacher
from opd_ds.errors import UserError
from opd_ds.evaluation.results import RESULTS_FILE, means, read_results
from opd_ds.miniature.world import ALL_TASKS, TASKS
from opd_ds.plan.passes import Passes
from opd_ds.runs.monitor import METRICS_FILE, SCORES_FILE, read_metrics
from opd_ds.runs.setup import EVALUATION_FOLDER

COLUMNS = ("method", "seed", "task", "reward", "passes", "seconds")
# What every model is scored on: the tasks, and prompts that ask for all of them (the product of the tasks' rewards).
SCORED = (*TASKS, ALL_TASKS)
# A rollout ends at its last query: up to 0.8 % more or fewer passes were measured than planned.
_RANDOM_PASSES = 0.01

Rewards = dict[str, float]  # by `SCORED`


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
        outcomes: of the methods that have every seed.
        singles: of settings that only the first seed was run with: queries and further ones.
        curves: by method and seed, from the base on.
        noise: by kind of rollout, from the base on.
        gradients: the report of `gradients.py`.
        other_passes: runs whose passes are not those that the budget was made with, by more than random queries make.
    """

    outcomes: list[Outcome]
    singles: list[Outcome]
    curves: dict[tuple[str, int], list[Point]]
    noise: dict[str, list[Point]]
    gradients: dict[str, Any]
    other_passes: list[str] = field(default_factory=list)


def collect(plan: Plan, folder: Path, real: Rewards | None, gradients: dict[str, Any]) -> Findings:
    """Read the finished runs of `plan` in `folder`."""
    start = Point(Passes(), _evaluated(folder / BASE, BASE))
    outcomes = [Outcome("base", None, start.rewards)]
    outcomes += [Outcome("real", None, real)] if real is not None else []
    curves: dict[tuple[str, int], list[Point]] = {}
    for seed in plan.seeds:
        teachers = [_outcome(f"teacher:{task}", seed, folder, [teacher(task, seed)]) for task in TASKS]
        weights = _evaluated(folder / merged_scores(seed), MERGED)
        outcomes += [*teachers, Outcome(MERGED, seed, weights, _sum(teachers))]
        for variant in plan.students:
            found = _outcome(variant.name, seed, folder, [student(variant, seed)])
            outcomes.append(found)
            if variant.name == STUDENT:
                seconds = sum((one.seconds for one in teachers), found.seconds)
                outcomes.append(Outcome(WITH_TEACHERS, seed, found.rewards, _sum([*teachers, found]), seconds))
                curves[STUDENT, seed] = [start, *curve(folder, [student(variant, seed)])]
        for method, names in {JOINT: [joint(seed)], CASCADE: cascade(seed)}.items():
            outcomes.append(_outcome(method, seed, folder, names))
            curves[method, seed] = [start, *curve(folder, names)]
    first = plan.seeds[0]
    singles = [
        _outcome(variant.name, first, folder, [student(variant, first)]) for variant in (*plan.queries, *plan.further)
    ]
    noise = {variant.name: [start, *curve(folder, [student(variant, first)])] for variant in plan.noise}
    other = [
        run.name
        for run in runs(plan)
        if abs(measured_passes(folder / run.name).units / run.passes.units - 1) > _RANDOM_PASSES
    ]
    return Findings(outcomes, singles, curves, noise, gradients, other)


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


def mean_of_tasks(rewards: Rewards) -> float:
    """The mean over tasks, without the prompts that ask for all."""
    return fmean(rewards[task] for task in TASKS)


def _label(task: str) -> str:
    return f"miniature_{task}"


def _rewards(scores: dict[str, float]) -> Rewards:
    """From scores by `<prompts>/<reward>`."""
    return {task: scores[f"{task}/{_label(task)}"] for task in TASKS} | {
        ALL_TASKS: scores[f"{ALL_TASKS}/miniature_all"]
    }


def _evaluated(folder: Path, model: str) -> Rewards:
    """What `opd-ds eval` found of a model, by `<prompts>/<reward>` as scores.jsonl has it."""
    found = means(read_results(folder / EVALUATION_FOLDER / RESULTS_FILE))[model]
    return _rewards({f"{name}/{label}": value for name, labels in found.items() for label, value in labels.items()})


def _sum(outcomes: Iterable[Outcome]) -> Passes:
    return sum((one.passes for one in outcomes), Passes())


def _outcome(method: str, seed: int, folder: Path, names: list[str]) -> Outcome:
    """Of runs that go on from each other."""
    metrics = [row for name in names for row in read_metrics(folder / name / METRICS_FILE)]
    seconds = sum(value for row in metrics for key, value in row.items() if key.startswith("seconds/"))
    passes = sum((measured_passes(folder / name) for name in names), Passes())
    return Outcome(method, seed, curve(folder, names)[-1].rewards, passes, seconds)


def curve(folder: Path, names: list[str]) -> list[Point]:
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
                points.append(Point(spent, _rewards(found)))
    return points
