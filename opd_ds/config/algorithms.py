"""All algorithms by name, and the two kinds of run that they make: distillation, and learning from rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union

from pydantic import Discriminator, Field, Tag, model_validator

from opd_ds.config.base import Algorithm
from opd_ds.config.objectives import ClosedForm, FlowMatching, Objective, PaperObjective, PolicyGradient
from opd_ds.config.paths import same_place
from opd_ds.config.rl import GuardSection, LearnedSection, NftSection, RewardAlgorithm, RewardTermSection
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ANCHOR, BASE, TaskSection, TrainedSteps
from opd_ds.config.teachers import AnchorSection, BaseSection, TeacherSection

# A further algorithm is one line here: its section says the rest, its trainer included.
ALGORITHMS: dict[str, type[Algorithm]] = {
    "closed_form": ClosedForm,
    "ppo": PolicyGradient,
    "sft": FlowMatching,
    "nft": NftSection,
    "guard": GuardSection,
}


def algorithm_names(kind: type[Algorithm]) -> list[str]:
    """The names of one kind's algorithms."""
    return [name for name, section in ALGORITHMS.items() if issubclass(section, kind)]


def _chosen_by(key: str, kind: type[Algorithm], default: str | None = None) -> Any:
    """The annotation of a section that is one of `kind`'s algorithms, chosen by the value of `key`."""

    def name_of(value: Any) -> Any:
        return value.get(key, default) if isinstance(value, dict) else getattr(value, key, None)

    tagged = [Annotated[ALGORITHMS[name], Tag(name)] for name in algorithm_names(kind)]
    return Annotated[Union[tuple(tagged)], Discriminator(name_of)]  # noqa: UP007  # made at run time


if TYPE_CHECKING:
    AnyObjective = PaperObjective
    AnyRewardAlgorithm = RewardAlgorithm
else:
    AnyObjective = _chosen_by("method", Objective, "closed_form")
    AnyRewardAlgorithm = _chosen_by("algorithm", RewardAlgorithm)


class DistilConfig(RunConfig):
    """Several teachers into one student: `opd-ds train`."""

    resume_invariants: ClassVar[tuple[str, ...]] = (*RunConfig.resume_invariants, "objective", "reward_term")

    objective: AnyObjective = Field(ClosedForm(), description="by what the student learns from its teachers")
    anchor: AnchorSection | None = None
    base: BaseSection = BaseSection()
    reward_term: RewardTermSection | None = Field(
        None, description="where the student learns from the tasks' rewards, too; default: they only monitor"
    )
    tasks: dict[str, TaskSection] = Field(min_length=1, description="what is learned, by names of your own")

    @property
    def algorithm(self) -> Algorithm:
        return self.objective

    @property
    def teachers(self) -> dict[str, TeacherSection]:
        return {name: task.teacher for name, task in self.tasks.items()}

    @property
    def all_teachers(self) -> dict[str, TeacherSection]:
        found = self.teachers | ({ANCHOR: self.anchor} if self.anchor else {})
        if self.objective.extrapolation:
            placed: BaseSection | TeacherSection = self.base
            if self._anchor_is_base and self.base.placement == "auto":
                placed = found[ANCHOR]  # one network serves both
            # It is asked with each teacher's guidance; 1 is one that every family knows.
            found[BASE] = TeacherSection(
                path=self.model.path,
                guidance=1.0,
                placement=placed.placement,
                deepspeed=placed.deepspeed,
                quantize=placed.quantize,
            )
        return found

    def with_teachers(self, sections: Mapping[str, TeacherSection]) -> DistilConfig:
        tasks = {name: task.model_copy(update={"teacher": sections[name]}) for name, task in self.tasks.items()}
        base = self.base
        if (section := sections.get(BASE)) is not None:
            base = BaseSection(placement=section.placement, deepspeed=section.deepspeed, quantize=section.quantize)
        return self.model_copy(update={"tasks": tasks, "anchor": sections.get(ANCHOR), "base": base})

    @property
    def trainer(self) -> str:
        return self.objective.rewarded_trainer if self.reward_term else super().trainer

    @property
    def learns_from_rewards(self) -> bool:
        return self.reward_term is not None

    @property
    def group_size(self) -> int:
        return self.reward_term.group if self.reward_term else 1

    @property
    def kept_per_state(self) -> int:
        return max(super().kept_per_state, self.reward_term.kept_per_state if self.reward_term else 0)

    @property
    def _anchor_is_base(self) -> bool:
        return self.anchor is not None and same_place(self.anchor.path, self.model.path)

    def asked(self, task: str) -> dict[str, float]:
        """The frozen networks that are asked at a task's trained states, named as in `all_teachers`, and the guidance
        of each. The base has the teacher's: what is extrapolated is then what the teacher has learned, and not the
        difference of two guidances. An anchor that is the base with the same guidance is not asked a second time.
        """
        guidance = self.tasks[task].teacher.guidance
        found = {task: guidance} if self.objective.asks_teacher else {}
        if self.objective.extrapolation:
            found[BASE] = guidance
        if self.anchor and not (BASE in found and self._anchor_is_base and self.anchor.guidance == guidance):
            found[ANCHOR] = self.anchor.guidance
        return found

    def roles(self, task: str) -> dict[str, str]:
        """Which of `asked` is what to the loss: `teacher`, `anchor`, `base`."""
        asked = self.asked(task)
        found = {"teacher": task, "base": BASE} if BASE in asked else {"teacher": task} if task in asked else {}
        return found | ({"anchor": ANCHOR if ANCHOR in asked else BASE} if self.anchor else {})

    def kept_apart(self, task: str, passes: Callable[[float], int]) -> set[str]:
        """Those of `asked` of which both branches are kept too, until training, where there are two: all that are
        compared apart, else the teacher alone, for the errors that are measured of it.

        Args:
            passes: of one guided velocity of the run's family, by guidance.
        """
        asked = self.asked(task)
        if task not in asked or passes(self.student_guidance(task)) == 1 or passes(asked[task]) == 1:
            return set()
        return set(asked) if self.objective.guided == "apart" else {task}

    def kept_velocities(self, task: str, passes: Callable[[float], int]) -> int:
        return super().kept_velocities(task, passes) + 2 * len(self.kept_apart(task, passes))

    def rollout_guidance(self, task: str) -> float:
        own = self.objective.drawn_by == "student"
        return self.student_guidance(task) if own else self.tasks[task].teacher.guidance

    def queried_guidances(self, task: str) -> list[float]:
        return list(self.asked(task).values())

    def resume_settings(self) -> dict[str, Any]:
        data = super().resume_settings()
        # As in checkpoints from before there were such settings.
        if not self.objective.extrapolation:
            data["objective"].pop("extrapolation")
        if self.objective.guided == "together":
            for key in ("guided", "direction_weight"):
                data["objective"].pop(key)
        if self.scoring.late:
            data["scoring"] = {"late": self.scoring.late}
        if self.reward_term:
            data["reward_term"].pop("reward_attempts")
        return data

    @model_validator(mode="after")
    def _same_forwards(self) -> DistilConfig:
        if self.scoring.micro_batch == "auto":
            for name, teacher in self.all_teachers.items():
                if teacher.placement == "zero_inference":
                    raise ValueError(
                        "scoring.micro_batch = 'auto' may come out differently on each rank, but the forwards of "
                        f"{self.teacher_key(name)}.placement = 'zero_inference' are collective; give a number"
                    )
        return self

    @model_validator(mode="after")
    def _teachers_can_have_ranks(self) -> DistilConfig:
        ranks = self.scoring.ranks
        if ranks == 0:
            return self
        if self.algorithm.drawn_by == "teacher":
            raise ValueError(
                f"objective.method = {self.objective.method!r} trains on what teachers draw, so scoring.ranks = "
                f"{ranks} would only make it wait; set it to 0, or use another method"
            )
        placements = {name: teacher.placement for name, teacher in self.all_teachers.items()}
        for name, placement in placements.items():
            if placement not in ("auto", "resident", "zero_inference"):
                why = "lives in the student's network" if placement == "shared" else "travels for every question"
                raise ValueError(
                    f"scoring.ranks = {ranks}: {self.teacher_key(name)}.placement = {placement!r} {why}, but teacher "
                    "ranks hold nothing else and answer all the time; set it to auto, resident or zero_inference"
                )
        if ranks > 1 and "zero_inference" in placements.values() and set(placements.values()) != {"zero_inference"}:
            whole = next(name for name, placement in placements.items() if placement != "zero_inference")
            raise ValueError(
                f"scoring.ranks = {ranks}: some teachers are sharded over the teacher ranks (placement = "
                f"'zero_inference') and {self.teacher_key(whole)}.placement = {placements[whole]!r} is not; set it for "
                "all of them or for none"
            )
        return self

    @model_validator(mode="after")
    def _two_branches(self) -> DistilConfig:
        if self.objective.guided == "together":
            return self
        for task in self.tasks:
            student = "rollout.guidance" if self.tasks[task].guidance is None else f"tasks.{task}.guidance"
            found = {student: self.student_guidance(task)}
            found |= {f"{self.teacher_key(name)}.guidance": value for name, value in self.asked(task).items()}
            for key, value in found.items():
                if value == 1:
                    raise ValueError(
                        "objective.guided = 'apart' compares the velocities with prompt and without, and with "
                        f"{key} = 1 there is one alone; give it a guidance, or set objective.guided to 'together'"
                    )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> DistilConfig:
        if self.algorithm.needs_noise:
            self.check_noise(f"objective.method = {self.objective.method!r}")
        if self.rollout.negative_every > 1:
            self._check_kept_directions()
        return self

    def _check_kept_directions(self) -> None:
        key = f"rollout.negative_every = {self.rollout.negative_every}"
        if self.objective.method != "closed_form" or self.reward_term:
            what = "reward_term" if self.reward_term else f"objective.method = {self.objective.method!r}"
            raise ValueError(
                f"{key} draws with nearly the student's velocities, and {what} weighs or learns from what was drawn; "
                "set it to 1"
            )

    @property
    def against_fused(self) -> tuple[str, str] | None:
        for name, teacher in self.all_teachers.items():
            if teacher.placement not in ("auto", "resident", "shared"):
                key = f"{self.teacher_key(name)}.placement"
                return (
                    f"it asks every teacher at every step, but {key} = {teacher.placement!r} is brought in once a "
                    "round",
                    f"set {key} to 'resident' or 'shared', or ",
                )
        counts = {f"scoring.{key}": (getattr(self.scoring, key), 0) for key in ("late", "ranks")}
        counts |= {"rollout.negative_every": (self.rollout.negative_every, 1)}
        counts |= {f"train.{key}": (getattr(self.train, key), 1) for key in ("inner_epochs", "updates_per_round")}
        for key, (value, least) in counts.items():
            if value > least:
                return f"it trains while it rolls out, so {key} = {value} is not possible", f"set {key} to {least}, or "
        if not self.objective.fused_trainer:
            fusing = [name for name in algorithm_names(Objective) if ALGORITHMS[name].fused_trainer]
            known = " or ".join(map(repr, fusing))
            return f"it knows objective.method = {known} only, not {self.objective.method!r}", ""
        if self.reward_term:
            return "it trains while it rolls out, and the rewards of reward_term come after a rollout", ""
        return None

    @model_validator(mode="after")
    def _rewards_can_be_learned_from(self) -> DistilConfig:
        if self.reward_term is None:
            return self
        if not self.objective.rewarded_trainer:
            able = [name for name in algorithm_names(Objective) if ALGORITHMS[name].rewarded_trainer]
            raise ValueError(
                f"reward_term goes with objective.method = {' or '.join(map(repr, able))} only, not "
                f"{self.objective.method!r}; leave it out, or use another method"
            )
        self.check_groups("reward_term")
        self.check_noise("reward_term")
        for name, task in self.tasks.items():
            if not any(reward.weight for reward in task.rewards):
                raise ValueError(
                    f"tasks.{name}.rewards: reward_term learns from every task's rewards, and here is none with a "
                    "weight; give one, or leave reward_term out"
                )
        return self


class TeachConfig(RunConfig):
    """A specialist by reinforcement learning: `opd-ds teach`."""

    resume_invariants: ClassVar[tuple[str, ...]] = (*RunConfig.resume_invariants, "teach")

    teach: AnyRewardAlgorithm = Field(description="by what the student learns from rewards")
    tasks: dict[str, LearnedSection] = Field(min_length=1)

    @property
    def algorithm(self) -> Algorithm:
        return self.teach

    @property
    def learns_from_rewards(self) -> bool:
        return True

    @property
    def against_fused(self) -> tuple[str, str] | None:
        return "rewards come after a rollout", ""

    @property
    def group_size(self) -> int:
        return self.teach.group

    def resume_settings(self) -> dict[str, Any]:
        data = super().resume_settings()
        data["teach"].pop("reward_attempts")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> TeachConfig:
        rollout, teach = self.rollout, self.teach
        self.check_groups("teach")
        if self.scoring.micro_batch == "auto":
            raise ValueError(
                "scoring.micro_batch = 'auto' may come out differently on each rank, but frozen policies are asked "
                "through the student, whose forwards may be collective; give a number"
            )
        if self.scoring.late:
            raise ValueError(
                f"scoring.late = {self.scoring.late} is for teachers; learning from rewards has none, set it to 0"
            )
        if rollout.negative_every > 1:
            raise ValueError(
                f"rollout.negative_every = {rollout.negative_every} draws with nearly the student's velocities, and "
                "rewards are learned from what was drawn; set it to 1"
            )
        if self.scoring.ranks:
            raise ValueError(
                f"scoring.ranks = {self.scoring.ranks} is for teachers; learning from rewards has none, set it to 0"
            )
        if teach.needs_noise:
            self.check_noise(f"teach.algorithm = {teach.algorithm!r}")
        if teach.trained_window is None:
            return self
        if rollout.trained_steps != TrainedSteps(fraction=1.0):
            raise ValueError("teach.window says which steps are trained; leave rollout.trained_steps out")
        if teach.trained_window > rollout.steps:
            raise ValueError(f"teach.window = {teach.trained_window}: a trajectory has only {rollout.steps} steps")
        return self
