"""summary.json: what was found per method, and which of the paper's claims hold here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

from benchmarks.paper.methods import BEYOND, CASCADE, JOINT, MERGED, STUDENT, WITH_TEACHERS
from benchmarks.paper.table import SCORED, Findings, Outcome, Point, Rewards, mean_of_tasks
from opd_ds.evaluation.statistics import normalised_average
from opd_ds.miniature.world import ALL_TASKS, TASKS

KEPT, HALF, SURPASSED = 0.98, 0.5, 2
_RIVALS = (JOINT, CASCADE)

Claim = dict[str, Any]


def summary(findings: Findings, settings: dict[str, Any]) -> dict[str, Any]:
    """As plain data.

    `methods`: by task mean and spread (standard deviation over seeds; None for one seed), passes, seconds, and
    `average`: the mean over tasks of min-max normalised means, over the base and all methods that are trained.
    `singles`: the same without average, of settings that only the first seed was run with.
    `student_by_teacher`: ratios by task and seed. `claims`: each with `holds` and the numbers it rests on.
    """
    by_method = _by_method(findings.outcomes)
    average = _averages({name: _mean_rewards(several) for name, several in by_method.items()})
    claims = [_keeps_teachers(findings), *_passes_teachers(findings), *_ahead_by_three_accounts(findings)]
    claims += [_does_all_at_once(findings)]
    claims += [_teachers_gain(findings)] if "real" in by_method else []
    claims += [_lower_variance(findings)]
    return {
        "settings": settings,
        "methods": {name: _method(several) | {"average": average.get(name)} for name, several in by_method.items()},
        "singles": {name: _method(several) for name, several in _by_method(findings.singles).items()},
        "student_by_teacher": _ratios(findings),
        "claims": claims,
        "left_out": [] if "real" in by_method else ["real images: scikit-learn is not installed"],
        "passes_other_than_planned": findings.other_passes,
    }


def _by_method(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.method, []).append(one)
    return found


def _method(several: list[Outcome]) -> dict[str, Any]:
    tasks = {
        task: {
            "mean": fmean(one.rewards[task] for one in several),
            "spread": stdev(one.rewards[task] for one in several) if len(several) > 1 else None,
        }
        for task in SCORED
    }
    return {
        "tasks": tasks,
        "mean_of_tasks": fmean(mean_of_tasks(one.rewards) for one in several),
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


def _passes_teachers(findings: Findings) -> list[Claim]:
    """One claim per strength of extrapolation that was run."""
    rewards, claims = _all_mean_rewards(findings), []
    for method in (name for name in BEYOND if name in rewards):
        both = {task: (rewards[method][task], rewards[f"teacher:{task}"][task]) for task in TASKS}
        claims.append(
            {
                "claim": f"{method} is above its teachers on at least {SURPASSED} tasks, on average over seeds",
                "holds": sum(student > teacher for student, teacher in both.values()) >= SURPASSED,
                "numbers": {task: {"student": own, "teacher": teacher} for task, (own, teacher) in both.items()},
            }
        )
    return claims


def _ahead_by_three_accounts(findings: Findings) -> list[Claim]:
    """What the distillation cost, in three ways; joint and cascade are read at the first evaluation that has cost as
    much, or at their end.
    """
    alone = _by_seed(findings, STUDENT, lambda one: float(one.passes.units))
    counted = _by_seed(findings, WITH_TEACHERS, lambda one: float(one.passes.units))
    teachers = [_by_seed(findings, f"teacher:{task}", lambda one: float(one.passes.units)) for task in TASKS]
    parallel = {seed: units + max(by_seed[seed] for by_seed in teachers) for seed, units in alone.items()}
    accounts = {
        "teachers counted": counted,
        "teachers trained side by side, as the paper counts (the slowest one and the distillation)": parallel,
        "teachers not counted": alone,
    }
    return [_ahead_at(findings, account, units) for account, units in accounts.items()]


def _ahead_at(findings: Findings, account: str, units: dict[int, float]) -> Claim:
    read = {rival: [_at(findings.curves[rival, seed], spent) for seed, spent in units.items()] for rival in _RIVALS}
    table = _all_mean_rewards(findings) | {
        rival: _mean_of([point.rewards for point in points]) for rival, points in read.items()
    }
    average = _averages(table)
    numbers = {name: average.get(name) for name in (STUDENT, *_RIVALS)}
    spent = {rival: dict(zip(units, (p.passes.units for p in points), strict=True)) for rival, points in read.items()}
    ours = numbers[STUDENT]
    ahead = ours is not None and all((numbers[rival] or 0.0) < ours for rival in _RIVALS)
    return {
        "claim": f"{account}: distilling is ahead of joint and cascaded learning on average at equal passes",
        "holds": ahead,
        "numbers": {"average": numbers, "pass units by seed": {STUDENT: units, **spent}},
    }


def _does_all_at_once(findings: Findings) -> Claim:
    rewards = {name: one[ALL_TASKS] for name, one in _all_mean_rewards(findings).items()}
    numbers = {name: rewards[name] for name in (STUDENT, *(f"teacher:{task}" for task in TASKS), MERGED)}
    return {
        "claim": "on prompts that ask for all tasks at once the student is ahead of every teacher and of their merged "
        "weights",
        "holds": all(value < numbers[STUDENT] for name, value in numbers.items() if name != STUDENT),
        "numbers": {"product of the three rewards": numbers},
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
            seed: reward / teachers[seed] for seed, reward in _rewards_by_seed(findings, STUDENT, task).items()
        }
    return result


def _mean_of(several: list[Rewards]) -> Rewards:
    return {task: fmean(rewards[task] for rewards in several) for task in SCORED}


def _mean_rewards(several: list[Outcome]) -> Rewards:
    return _mean_of([one.rewards for one in several])


def _all_mean_rewards(findings: Findings) -> dict[str, Rewards]:
    return {name: _mean_rewards(several) for name, several in _by_method(findings.outcomes).items()}


def _averages(rewards: dict[str, Rewards]) -> dict[str, float | None]:
    """Mean over tasks of min-max normalised rewards. Real images are no method, and the student counts once."""
    methods = {name: by_task for name, by_task in rewards.items() if name not in ("real", WITH_TEACHERS)}
    average = normalised_average({name: [by_task[task] for task in TASKS] for name, by_task in methods.items()})
    return average | ({WITH_TEACHERS: average[STUDENT]} if WITH_TEACHERS in rewards else {})


def _at(curve: list[Point], units: float) -> Point:
    """The first point at or beyond so many pass units, else the last: never less than was spent here."""
    return next((point for point in curve if point.passes.units >= units), curve[-1])
