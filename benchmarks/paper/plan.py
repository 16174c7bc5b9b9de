"""The plan behind `python -m benchmarks paper-miniature`: does distilling specialists beat joint and cascaded learning?

Per seed: three specialists by DiffusionNFT, one student distilled from them, and with the budget of all four together
one model that learns all tasks in turns (joint) and one that learns them one after the other (cascade). The budget is
counted in pass units (`Passes.units`). With the first seed also: the same distillation along the ODE and along SDEs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.paper.jobs import Job
from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.miniature.world import TASKS
from opd_ds.plan.passes import Passes, planned_passes

BASE, GRADIENTS = "base", "gradients"
# The paper's objective, whose weight is the exact KL with noise and mean matching without: one setting for all three.
CONVERGENCE = {
    "ode": ("rollout.kernel=euler",),
    "sde-0.3": ("rollout.kernel=flow", "rollout.noise_level=0.3"),
    "sde-0.7": ("rollout.kernel=flow", "rollout.noise_level=0.7"),
}
EVALUATION_STEPS = 10
_HELD_OUT = 60 * len(TASKS)  # prompts

# Seconds, measured on one core: a forward pass, what a backward pass adds, a decoded and scored image, a start.
_FORWARD, _BACKWARD, _PICTURE, _START = 1.65e-3, 2.35e-3, 6e-3, 12.0


@dataclass(frozen=True)
class Plan:
    """How much is run. A teacher's round is one of `miniature_nft_<task>`, a student's one of `miniature`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    teacher_rounds: tuple[int, ...] = (40, 25, 60)  # in the order of TASKS
    opd_rounds: int = 320
    convergence_rounds: int = 40
    evaluations: int = 3  # along a run
    samples_per_prompt: int = 2
    gradient_rollouts: int = 32
    gradient_transitions: int = 32


FULL = Plan()
QUICK = replace(
    FULL, seeds=(0,), teacher_rounds=(5, 4, 8), opd_rounds=40, convergence_rounds=16, evaluations=3,
    samples_per_prompt=1, gradient_rollouts=8, gradient_transitions=8,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One `opd-ds teach` or `train`, in the folder `name`."""

    name: str
    command: str
    recipe: str
    rounds: int
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        # Paths begin with a dot: what is missing is then never taken for a name on the model hub.
        return [f"run.output_dir=./{self.name}", f"run.rounds={self.rounds}", *self.settings]

    @cached_property
    def config(self) -> RunConfig:
        return load_config(self.recipe, None, self.overrides)

    @cached_property
    def passes(self) -> Passes:
        return planned_passes(self.config)

    def job(self) -> Job:
        sets = [part for override in self.overrides for part in ("--set", override)]
        arguments = (self.command, "--recipe", self.recipe, "--resume", "auto", *sets)
        return Job(self.name, arguments, self.needs, seconds=self._seconds())

    def _seconds(self) -> float:
        every, evaluation = self.config.run.eval_every, self.config.evaluation
        evaluations = 1 + ((self.rounds - 1) // every if every else 0)
        scored = self.config.rollout.samples * self.rounds if self.command == "teach" else 0
        drawn = evaluations * _HELD_OUT * evaluation.samples_per_prompt
        work = self.passes.forward * _FORWARD + self.passes.backward * _BACKWARD + scored * _PICTURE
        return _START + work + drawn * (evaluation.steps * _FORWARD + _PICTURE)


def export(name: str) -> str:
    """Where the run `name` leaves its model, from the bench's folder."""
    return f"./{name}/{EXPORT_FOLDER}"


def teacher(task: str, seed: int) -> str:
    return f"teacher-{task}-{seed}"


def opd(seed: int) -> str:
    return f"opd-{seed}"


def joint(seed: int) -> str:
    return f"joint-{seed}"


def cascade(seed: int) -> list[str]:
    """The stages in order."""
    return [f"cascade-{seed}-{number}-{task}" for number, task in enumerate(TASKS, 1)]


def convergence(kind: str) -> str:
    return f"convergence-{kind}"


def runs(plan: Plan) -> list[Run]:
    """All runs; those that others wait for come first."""
    return [*(run for seed in plan.seeds for run in _of_seed(plan, seed)), *_convergence(plan)]


def jobs(plan: Plan) -> list[Job]:
    """The runs, the base's scores and the gradients' variance."""
    base = ["eval", "--recipe", "miniature", "--no-defaults", "--model", "base"]
    for override in (f"run.output_dir=./{BASE}", *_evaluated_alike(plan)):
        base += ["--set", override]
    first = teacher(TASKS[0], plan.seeds[0])
    sizes = [str(number) for number in (16, plan.gradient_rollouts, plan.gradient_transitions)]
    variance = (export(first), TASKS[0], f"./{GRADIENTS}/{GRADIENTS}.json", *sizes)
    # 10 steps of 16 states: rollout, both gradients; then the gradients for transitions that are redrawn.
    states = 160 * (plan.gradient_rollouts * 7 + plan.gradient_transitions)
    return [
        Job(BASE, tuple(base), seconds=_START + _HELD_OUT * plan.samples_per_prompt * (10 * _FORWARD + _PICTURE)),
        *(run.job() for run in runs(plan)),
        Job(GRADIENTS, variance, (first,), "benchmarks.paper.gradients", _START + states * _BACKWARD),
    ]


def _of_seed(plan: Plan, seed: int) -> list[Run]:
    teachers = [
        Run(teacher(task, seed), "teach", f"miniature_nft_{task}", rounds, _common(plan, seed))
        for task, rounds in zip(TASKS, plan.teacher_rounds, strict=True)
    ]
    student = _student(plan, seed, opd(seed), plan.opd_rounds)
    spent = sum((run.passes for run in teachers), student.passes)
    # Rounded up to a whole round of each task: joint and cascade never have less than the distillation.
    turns = -(-spent.units // sum(_one_round(run).units for run in teachers))
    # Where joint and cascade have spent what the distillation alone has: they are looked at there.
    mark = student.passes.units // _one_round(teachers[0]).units
    total = turns * len(TASKS)
    stages = list(_cascade(plan, seed, turns, mark))
    every = _look_every(plan, total, mark)
    together = Run(joint(seed), "teach", "miniature_nft_joint", total, (*_common(plan, seed), every))
    return [*teachers, *stages, student, together]


def _cascade(plan: Plan, seed: int, rounds: int, mark: int) -> Iterator[Run]:
    before: tuple[str, ...] = ()
    for number, (task, name) in enumerate(zip(TASKS, cascade(seed), strict=True)):
        every = _look_every(plan, rounds, mark - number * rounds)
        start = tuple(f"student.start={export(stage)}" for stage in before)
        settings = (*_common(plan, seed), every, *start)
        yield Run(name, "teach", f"miniature_nft_{task}", rounds, settings, before)
        before = (name,)


def _convergence(plan: Plan) -> list[Run]:
    objective = "objective={target: transition, weighting: kl}"
    return [
        _student(plan, plan.seeds[0], convergence(kind), plan.convergence_rounds, objective, *settings)
        for kind, settings in CONVERGENCE.items()
    ]


def _student(plan: Plan, seed: int, name: str, rounds: int, *more: str) -> Run:
    teachers = [teacher(task, seed) for task in TASKS]
    settings = [f"optimizer.warmup_rounds={max(1, rounds // 25)}"]
    for task, source in zip(TASKS, teachers, strict=True):
        settings += [f"tasks.{task}.teacher.path={export(source)}", f"tasks.{task}.teacher.guidance=1.0"]
    every = f"run.eval_every={max(1, rounds // plan.evaluations)}"
    return Run(name, "train", "miniature", rounds, (*_common(plan, seed), every, *settings, *more), tuple(teachers))


def _common(plan: Plan, seed: int) -> tuple[str, ...]:
    quiet = ("run.eval_every=0", "run.image_every=0", "run.keep_checkpoints=1")
    return (f"run.seed={seed}", *quiet, *_evaluated_alike(plan))


def _evaluated_alike(plan: Plan) -> tuple[str, ...]:
    """Base and teachers have jobs of their own; without this every distillation would draw them again."""
    return (
        "deepspeed=ds_configs/zero0.json",  # on one rank there is nothing to shard, and hooks cost time
        "rollout.guidance=1.0",
        f"evaluation.steps={EVALUATION_STEPS}",
        f"evaluation.samples_per_prompt={plan.samples_per_prompt}",
        "evaluation.baselines=false",
    )


def _one_round(run: Run) -> Passes:
    return planned_passes(replace(run, rounds=1).config)


def _look_every(plan: Plan, rounds: int, mark: int) -> str:
    """So that one evaluation is at round `mark`, where that is inside the run and not too near to its start."""
    usual = max(1, rounds // plan.evaluations)
    if not usual <= mark < rounds:
        return f"run.eval_every={usual}"
    return f"run.eval_every={mark // max(1, round(mark / usual))}"
