"""The students that the bench compares: the shipped recipe, and the recipe with one thing changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from opd_ds.miniature.world import TASKS

# The recipe as it is, and the name under which its teachers' passes are counted as well.
STUDENT, WITH_TEACHERS = "opd", "opd+teachers"
MERGED, JOINT, CASCADE = "merged", "joint", "cascade"
BEYOND = ("opd-beyond-0.25", "opd-beyond-0.5")


@dataclass(frozen=True)
class Variant:
    """The recipe `miniature` with other settings; `name` is its row in tables."""

    name: str
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The start of its runs' folders."""
        return re.sub("[^a-z0-9.]+", "-", self.name)


TOGETHER = ("train.schedule=together", "rollout.samples=8")
_ONE_TASK = ("train.schedule=alternate", "rollout.samples=24")  # as many trajectories a round


def _queries(count: int, favour: str = "none") -> str:
    spread = "true" if count > 1 else "false"
    return f"rollout.trained_steps={{queries: {count}, favour: {favour}, spread: {spread}}}"


def guided(student: float) -> tuple[str, ...]:
    """The student's guidance, and 2 for its teachers."""
    return (f"rollout.guidance={student}", *(f"tasks.{task}.teacher.guidance=2.0" for task in TASKS))


# In the table of methods, with every seed. The recipe trains one task an update.
STUDENTS = (
    Variant(STUDENT),
    Variant(BEYOND[0], ("objective.extrapolation=0.25",)),
    Variant(BEYOND[1], ("objective.extrapolation=0.5",)),
    Variant("opd-together", TOGETHER),
    Variant("opd-k1", (_queries(1),)),
    Variant("opd-k2", (_queries(2),)),
    Variant("sft", ("objective={method: sft}",)),
)

# The recipe's objective with states of the ODE and of SDEs.
NOISE = (
    Variant("noise-0", ("rollout.kernel=euler",)),
    Variant("noise-0.3", ("rollout.kernel=flow", "rollout.noise_level=0.3")),
    Variant("noise-0.7", ("rollout.kernel=flow", "rollout.noise_level=0.7")),
)

# One thing each that a distillation may have besides. Guided students are scored with their guidance.
FURTHER = (
    Variant("one round late", ("scoring.late=1",)),
    Variant("guided teachers, guidance absorbed", guided(1.0)),
    Variant("guided teachers and student", guided(2.0)),
    Variant("guided teachers and student, matched apart", (*guided(2.0), "objective.guided=apart")),
    Variant(
        "with the rewards' policy gradient",
        ("rollout.kernel=flow", "rollout.noise_level=0.3", "reward_term={weight: 1.0, group: 8}"),
    ),
)

QUERIES, PLACES, SCHEDULES = (1, 2, 5), ("none", "low_noise", "high_noise"), ("together", "alternate")


@dataclass(frozen=True)
class Queries(Variant):
    """How many states of a trajectory are asked about, where they fall, and which tasks an update sums over."""

    count: int = 0
    place: str = ""
    schedule: str = ""


def queries() -> Iterator[Queries]:
    """Every combination, as in DanceOPD's ablation (arXiv 2606.27377)."""
    for count, place, schedule in product(QUERIES, PLACES, SCHEDULES):
        tasks = TOGETHER if schedule == "together" else _ONE_TASK
        name = f"queries-{count}-{place}-{schedule}"
        yield Queries(name, (_queries(count, place), *tasks), count, place, schedule)
