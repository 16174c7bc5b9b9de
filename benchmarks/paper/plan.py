"""The plan behind `python -m benchmarks paper-miniature`: does distilling specialists beat joint and cascaded learning?

Per seed: three specialists by DiffusionNFT, their weights merged, students distilled from them (`methods.STUDENTS`,
each with at most the passes of the shipped recipe), and with the budget of specialists and recipe together one model
that learns all tasks in turns (joint) and one that learns them one after the other (cascade). The budget is counted in
pass units (`Passes.units`). With the first seed also: where queries fall, noise in rollouts, and further settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.paper.jobs import Job
from benchmarks.paper.methods import CASCADE, FURTHER, JOINT, MERGED, NOISE, STUDENT, STUDENTS, Variant, queries
from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.miniature.world import TASKS
from opd_ds.plan.passes import Passes, planned_passes

BASE, GRADIENTS = "base", "gradients"
EVALUATION_STEPS = 10
_PROMPTS = 60 * (len(TASKS) + 1)  # held out

# Seconds, measured on one core: a forward pass, what a backward pass adds, a decoded and scored image, a start.
_FORWARD, _BACKWARD, _PICTURE, _START = 1.65e-3, 2.35e-3, 6e-3, 12.0


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        seeds: those that the recipes were not tuned on.
        share: of each recipe's rounds.
        evaluations: along a run; of joint and cascade along all of it, so that they can be read at smaller budgets.
        students, queries, noise, further: what is distilled; the last three with the first seed only.
    """

    seeds: tuple[int, ...] = (3, 4, 5)
    share: float = 1.0
    evaluations: int = 3
    rival_evaluations: int = 9
    samples_per_prompt: int = 2
    gradient_rollouts: int = 32
    gradient_transitions: int = 32
    students: tuple[Variant, ...] = STUDENTS
    queries: tuple[Variant, ...] = tuple(queries())
    noise: tuple[Variant, ...] = NOISE
    further: tuple[Variant, ...] = FURTHER

    def with_parts(self, names: list[str]) -> Plan:
        """Only these of the parts that are run with the first seed.

        Raises:
            UserError: an unknown name.
        """
        parts = ("queries", "noise", "further")
        unknown = [name for name in names if name not in ("methods", *parts)]
        if unknown:
            raise UserError(f"--part {unknown[0]}: allowed are methods, {', '.join(parts)}")
        left = {part: getattr(self, part) if part in names else () for part in parts}
        return replace(self, queries=left["queries"], noise=left["noise"], further=left["further"])

    def rounds(self, recipe: str) -> int:
        return max(4, round(load_config(recipe, None, []).run.rounds * self.share))


FULL = Plan()
QUICK = replace(
    FULL, seeds=(0,), share=0.125, rival_evaluations=5, samples_per_prompt=1, gradient_rollouts=8,
    gradient_transitions=8, students=STUDENTS[:2], queries=FULL.queries[:2], noise=NOISE[:1], further=FURTHER[:1],
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
        return Job(self.name, arguments, self.needs, seconds=self._seconds(), settings=self._settings())

    def _settings(self) -> str:
        """Of the recipe as it is now, a hash of what differs from the defaults: keys to come change nothing."""
        said = json.dumps(self.config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _seconds(self) -> float:
        every, evaluation = self.config.run.eval_every, self.config.evaluation
        evaluations = 1 + ((self.rounds - 1) // every if every else 0)
        scored = self.config.rollout.samples * self.rounds if self.command == "teach" else 0
        drawn = evaluations * _PROMPTS * evaluation.samples_per_prompt
        work = self.passes.forward * _FORWARD + self.passes.backward * _BACKWARD + scored * _PICTURE
        return _START + work + drawn * (evaluation.steps * _FORWARD + _PICTURE)


def export(name: str) -> str:
    """Where the run `name` leaves its model, from the bench's folder."""
    return f"./{name}/{EXPORT_FOLDER}"


def teacher(task: str, seed: int) -> str:
    return f"teacher-{task}-{seed}"


def student(variant: Variant, seed: int) -> str:
    return f"{variant.folder}-{seed}"


def merged(seed: int) -> str:
    return f"{MERGED}-{seed}"


def merged_scores(seed: int) -> str:
    return f"{merged(seed)}-scores"


def joint(seed: int) -> str:
    return f"{JOINT}-{seed}"


def cascade(seed: int) -> list[str]:
    """The stages in order."""
    return [f"{CASCADE}-{seed}-{number}-{task}" for number, task in enumerate(TASKS, 1)]


def runs(plan: Plan) -> list[Run]:
    """All runs; those that others wait for come first."""
    first = plan.seeds[0]
    teachers = [run for seed in plan.seeds for run in _teachers(plan, seed)]
    rivals = [run for seed in plan.seeds for run in _rivals(plan, seed)]
    students = [_student(plan, seed, variant) for seed in plan.seeds for variant in plan.students]
    others = [_student(plan, first, variant) for variant in (*plan.queries, *plan.noise, *plan.further)]
    return [*teachers, *rivals, *students, *others]


def jobs(plan: Plan) -> list[Job]:
    """The runs, the scores of base and merged weights, and the gradients' variance."""
    first = teacher(TASKS[0], plan.seeds[0])
    sizes = [str(number) for number in (16, plan.gradient_rollouts, plan.gradient_transitions)]
    variance = (export(first), TASKS[0], f"./{GRADIENTS}/{GRADIENTS}.json", *sizes)
    # 10 steps of 16 states: rollout, both gradients; then the gradients for transitions that are redrawn.
    states = 160 * (plan.gradient_rollouts * 7 + plan.gradient_transitions)
    return [
        *(run.job() for run in runs(plan)),
        *(_merge(seed) for seed in plan.seeds),
        _evaluation(plan, BASE, ("--no-defaults", "--model", BASE)),
        *(_evaluation_of_merged(plan, seed) for seed in plan.seeds),
        Job(GRADIENTS, variance, (first,), "benchmarks.paper.gradients", _START + states * _BACKWARD),
    ]


def _merge(seed: int) -> Job:
    needs = tuple(teacher(task, seed) for task in TASKS)
    base = load_config("miniature", None, []).model.path
    return Job(merged(seed), ("merge", f"./{merged(seed)}/model", *map(export, needs), "--base", base), needs)


def _evaluation_of_merged(plan: Plan, seed: int) -> Job:
    name = merged(seed)
    return _evaluation(plan, merged_scores(seed), ("--no-defaults", "--model", f"{MERGED}=./{name}/model"), (name,))


def _evaluation(plan: Plan, name: str, models: tuple[str, ...], needs: tuple[str, ...] = ()) -> Job:
    """Of one model that no run has trained."""
    overrides = (f"run.output_dir=./{name}", *_evaluated_alike(plan))
    sets = [part for override in overrides for part in ("--set", override)]
    seconds = _START + _PROMPTS * plan.samples_per_prompt * (EVALUATION_STEPS * _FORWARD + _PICTURE)
    return Job(name, ("eval", "--recipe", "miniature", *models, *sets), needs, seconds=seconds)


def _teachers(plan: Plan, seed: int) -> list[Run]:
    recipes = {task: f"miniature_nft_{task}" for task in TASKS}
    return [
        Run(teacher(task, seed), "teach", recipe, plan.rounds(recipe), _common(plan, seed))
        for task, recipe in recipes.items()
    ]


def _rivals(plan: Plan, seed: int) -> list[Run]:
    """Rounded up to a whole round of each task: joint and cascade never have less than the distillation."""
    teachers = _teachers(plan, seed)
    spent = sum((run.passes for run in teachers), _student(plan, seed, Variant(STUDENT)).passes)
    turns = -(-spent.units // sum(_one_round(run).units for run in teachers))
    every = f"run.eval_every={max(1, turns * len(TASKS) // plan.rival_evaluations)}"
    settings = (*_common(plan, seed), every)
    together = Run(joint(seed), "teach", "miniature_nft_joint", turns * len(TASKS), settings)
    return [together, *_cascade(seed, turns, settings)]


def _cascade(seed: int, rounds: int, settings: tuple[str, ...]) -> Iterator[Run]:
    before: tuple[str, ...] = ()
    for task, name in zip(TASKS, cascade(seed), strict=True):
        start = tuple(f"student.start={export(stage)}" for stage in before)
        yield Run(name, "teach", f"miniature_nft_{task}", rounds, (*settings, *start), before)
        before = (name,)


def _student(plan: Plan, seed: int, variant: Variant) -> Run:
    """With the recipe's rounds, or as many as take no more passes than those."""
    teachers = [teacher(task, seed) for task in TASKS]
    settings = [*_common(plan, seed)]
    for task, source in zip(TASKS, teachers, strict=True):
        settings += [f"tasks.{task}.teacher.path={export(source)}", f"tasks.{task}.teacher.guidance=1.0"]

    def run(rounds: int, changes: Iterable[str]) -> Run:
        looked = (
            f"run.eval_every={max(1, rounds // plan.evaluations)}",
            f"optimizer.warmup_rounds={max(1, rounds // 25)}",
        )
        everything = (*settings, *looked, *changes)
        return Run(student(variant, seed), "train", "miniature", rounds, everything, tuple(teachers))

    recipe = run(plan.rounds("miniature"), ())
    if not variant.settings:
        return recipe
    cost = run(_SAMPLED, variant.settings).passes.units / _SAMPLED
    return run(int(recipe.passes.units / cost), variant.settings)


# Rounds whose passes are counted to know those of one: random queries make rounds differ, and tasks take turns.
_SAMPLED = 60


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
