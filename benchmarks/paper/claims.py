"""summary.json: what was found per method, and which of the paper's claims hold here."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from benchmarks.paper.table import WITH_TEACHERS, Findings, Outcome, Point, Rewards
from opd_ds.evaluation.statistics import normalised_average
from opd_ds.miniature.world import TASKS

KEPT, HALF = 0.98, 0.5
_RIVALS = ("joint", "cascade")

Claim = dict[str, Any]


def summary(findings: Findings, settings: dict[str, Any]) -> dict[str, Any]:
    """As plain data.

    `methods`: by task mean and spread (standard deviation over seeds; None for one seed), passes, seconds, and
    `average`: the mean over tasks of min-max normalised means, over all trained methods and the base.
    `student_by_teacher`: ratios by task and seed. `claims`: each with `holds` and the numbers it rests on.
    """
    by_method: dict[str, list[Outcome]] = {}
    for one in findings.outcomes:
        by_method.setdefault(one.method, []).append(one)
    average = _averages({name: _mean_rewards(several) for name, several in by_method.items()})
    claims = [_keeps_teachers(findings), _ahead_of_equal_budgets(findings, average), _ahead_of_equal_passes(findings)]
    claims += [_teachers_gain(findings)] if "real" in by_method else []
    claims += [_lower_variance(findings)]
    return {
        "settings": settings,
        "methods": {name: _method(several) | {"average": average.get(name)} for name, several in by_method.items()},
        "student_by_teacher": _ratios(findings),
        "claims": claims,
        "left_out": [] if "real" in by_method else ["real images: scikit-learn is not installed"],
        "passes_other_than_planned": findings.other_passes,
    }


def _method(several: list[Outcome]) -> dict[str, Any]:
    tasks = {
        task: {
            "mean": fmean(one.rewards[task] for one in several),
            "spread": stdev(one.rewards[task] for one in several) if len(several) > 1 else None,
        }
        for task in TASKS
    }
    return {
        "tasks": tasks,
        "passes": fmean(one.passes.total for one in several),
        "pass_units": fmean(one.passes.units for one in several),
        "seconds": fmean(one.seconds for one in several),
    }


# ---- the claims ----


def _keeps_teachers(findings: Findings) -> Claim:
    ratios = _ratios(findings)
    everything = [ratio for by_seed in ratios.values() for ratio in by_seed.values()]
    return {
        "claim": f"the student has at least {KEPT:.0%} of each specialist's reward on its own task, with every seed",
        "holds": min(everything) >= KEPT,
        "numbers": {"student / teacher by seed": ratios},
    }


def _ahead_of_equal_budgets(findings: Findings, average: dict[str, float | None]) -> Claim:
    units = {name: _by_seed(findings, name, lambda one: float(one.passes.units)) for name in (WITH_TEACHERS, *_RIVALS)}
    at_most = all(units[WITH_TEACHERS][seed] <= units[rival][seed] for rival in _RIVALS for seed in units[rival])
    numbers = {name: average.get(name) for name in ("opd", *_RIVALS)}
    return {
        "claim": "teachers counted, distilling is ahead of joint and cascaded learning on average at no more passes",
        "holds": at_most and _ahead(numbers),
        "numbers": {"average": numbers, "pass units by seed": units},
    }


def _ahead_of_equal_passes(findings: Findings) -> Claim:
    """Joint and cascade are read at the last evaluation at or below the passes of the distillation alone."""
    seeds = _by_seed(findings, "opd", lambda one: float(one.passes.units))
    read = {rival: [_at(findings.curves[rival, seed], units) for seed, units in seeds.items()] for rival in _RIVALS}
    table = _all_mean_rewards(findings) | {
        rival: _mean_of([point.rewards for point in points]) for rival, points in read.items()
    }
    average = _averages(table)
    numbers = {name: average.get(name) for name in ("opd", *_RIVALS)}
    units = {rival: dict(zip(seeds, (p.passes.units for p in points), strict=True)) for rival, points in read.items()}
    return {
        "claim": "teachers not counted, the student is ahead of joint and cascaded learning at its own passes",
        "holds": _ahead(numbers),
        "numbers": {"average": numbers, "pass units by seed": {"opd": seeds, **units}},
    }


def _teachers_gain(findings: Findings) -> Claim:
    base, real = (_only(findings, name).rewards for name in ("base", "real"))
    shares = {
        task: {
            seed: (reward - base[task]) / (real[task] - base[task])
            for seed, reward in _rewards_by_seed(findings, f"teacher:{task}", task).items()
        }
        for task in TASKS
    }
    return {
        "claim": "each specialist gains at least half of the distance from the base to real images, with every seed",
        "holds": all(share >= HALF for by_seed in shares.values() for share in by_seed.values()),
        "numbers": {"share of the distance by seed": shares},
    }


def _lower_variance(findings: Findings) -> Claim:
    ratio = findings.gradients["ratio"]
    by_step = {entry["step"]: entry["ratio"] for entry in findings.gradients["steps"]}
    return {
        "claim": "the closed form's gradient varies less than the PPO-style estimator's, summed over all steps",
        "holds": ratio > 1,
        "numbers": {"PPO-style / closed form": ratio, "by step": by_step},
    }


# ---- arithmetic ----


def _by_seed(findings: Findings, method: str, value: Callable[[Outcome], float]) -> dict[int, float]:
    return {one.seed: value(one) for one in findings.outcomes if one.method == method and one.seed is not None}


def _rewards_by_seed(findings: Findings, method: str, task: str) -> dict[int, float]:
    return _by_seed(findings, method, lambda one: one.rewards[task])


def _only(findings: Findings, method: str) -> Outcome:
    return next(one for one in findings.outcomes if one.method == method)


def _ratios(findings: Findings) -> dict[str, dict[int, float]]:
    """Student / teacher, by task and seed."""
    result = {}
    for task in TASKS:
        teachers = _rewards_by_seed(findings, f"teacher:{task}", task)
        result[task] = {
            seed: reward / teachers[seed] for seed, reward in _rewards_by_seed(findings, "opd", task).items()
        }
    return result


def _mean_of(several: list[Rewards]) -> Rewards:
    return {task: fmean(rewards[task] for rewards in several) for task in TASKS}


def _mean_rewards(several: list[Outcome]) -> Rewards:
    return _mean_of([one.rewards for one in several])


def _all_mean_rewards(findings: Findings) -> dict[str, Rewards]:
    names = dict.fromkeys(one.method for one in findings.outcomes)
    return {name: _mean_rewards([one for one in findings.outcomes if one.method == name]) for name in names}


def _averages(rewards: dict[str, Rewards]) -> dict[str, float | None]:
    """Mean over tasks of min-max normalised rewards. Real images are no method, and the student counts once."""
    methods = {name: by_task for name, by_task in rewards.items() if name not in ("real", WITH_TEACHERS)}
    average = normalised_average({name: [by_task[task] for task in TASKS] for name, by_task in methods.items()})
    return average | ({WITH_TEACHERS: average["opd"]} if WITH_TEACHERS in rewards else {})


def _ahead(average: dict[str, float | None]) -> bool:
    ours = average["opd"]
    theirs = [average[rival] for rival in _RIVALS]
    return ours is not None and all(value is not None and ours > value for value in theirs)


def _at(curve: list[Point], units: float) -> Point:
    """The last point at or below so many pass units; curves begin at 0."""
    return [point for point in curve if point.passes.units <= units][-1]
