"""The typed run config: what all runs have."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from opd_ds.config.base import Algorithm, Section
from opd_ds.config.sections import (
    ANCHOR,
    BASE,
    STOCHASTIC_KERNELS,
    WEIGHTED_SUM,
    EvaluatedSection,
    EvaluationSection,
    ModelSection,
    OptimizerSection,
    ProbeSection,
    RewardSection,
    RolloutSection,
    RunSection,
    ScoringSection,
    StudentSection,
    TrackerSection,
    TrainedSection,
    TrainSection,
    WatchSection,
)
from opd_ds.config.teachers import TeacherSection
from opd_ds.config.turns import rounds_before, tasks_of_round


class RunConfig(Section, ABC):
    """What all runs have. Batch sizes named `samples` are global; those named `micro_batch` are per rank and change no
    result.
    """

    # The sections that, beside tasks and base, decide a run's numbers: a resume with others is refused.
    resume_invariants: ClassVar[tuple[str, ...]] = ("precision", "student", "optimizer", "rollout")

    run: RunSection
    model: ModelSection
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="of weights and passes; masters, moments and averages are always fp32"
    )
    deepspeed: str = Field("zero3", description="name in ds_configs/ or path of a DeepSpeed JSON")
    student: StudentSection = StudentSection()
    optimizer: OptimizerSection = OptimizerSection()
    rollout: RolloutSection
    train: TrainSection = TrainSection()
    scoring: ScoringSection = ScoringSection()
    tasks: Mapping[str, TrainedSection] = Field(min_length=1)
    probes: dict[str, ProbeSection] = Field(
        default_factory=dict, description="further prompt sets to draw and score, by name"
    )
    evaluation: EvaluationSection = EvaluationSection()
    watch: WatchSection = WatchSection()
    trackers: tuple[TrackerSection, ...] = Field(
        (TrackerSection(name="tensorboard"),), description="where to look at the run, by name; []: nowhere"
    )

    @model_validator(mode="after")
    def _names_and_labels(self) -> RunConfig:
        for section in ("tasks", "probes"):
            for name in getattr(self, section):
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    raise ValueError(f"{section}: the name {name!r} may hold letters, digits, '_' and '-' only")
        both = self.tasks.keys() & self.probes.keys()
        if both:
            raise ValueError(f"probes: {min(both)!r} is a task as well; give it another name")
        names = [tracker.name for tracker in self.trackers]
        if len(set(names)) < len(names):
            raise ValueError(f"trackers: {max(names, key=names.count)!r} is named twice; name each once")
        self._check_reward_labels()
        return self

    @model_validator(mode="after")
    def _whole_updates(self) -> RunConfig:
        for name in self.tasks:
            updates, prompts = self.train.updates_per_round, self.samples(name) // self.group_size
            if prompts % updates:
                what = "prompts" if self.group_size > 1 else "samples"
                raise ValueError(
                    f"train.updates_per_round = {updates} does not divide the {prompts} {what} a round of task {name}; "
                    f"change it or {self.samples_key(name)}"
                )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> RunConfig:
        model, scoring = self.model, self.scoring
        if model.sequence_parallel == 1:
            return self
        refused = [
            ("scoring.ranks", scoring.ranks, scoring.ranks == 0, "teachers are asked where the student is", "0"),
            (
                "scoring.micro_batch", scoring.micro_batch, scoring.micro_batch != "auto",
                "every forward is made by several ranks, and auto may come out differently on each", "a number",
            ),
            (
                "model.attention", model.attention, model.attention in ("auto", "native"),
                "ranks exchange heads in the native kernel alone", "'auto'",
            ),
            (
                "model.compile_blocks", model.compile_blocks, not model.compile_blocks,
                "ranks exchange tokens inside the blocks, which was never compiled", "false",
            ),
        ]  # fmt: skip
        for key, value, allowed, reason, remedy in refused:
            if not allowed:
                raise ValueError(
                    f"model.sequence_parallel = {model.sequence_parallel} does not go with {key} = {value!r}: "
                    f"{reason}; set {key} to {remedy}, or model.sequence_parallel to 1"
                )
        return self

    def _check_reward_labels(self) -> None:
        seen: dict[str, RewardSection] = {}
        for name, section in self.evaluated.items():
            labels = [reward.label for reward in section.rewards]
            key = f"{self.place(name)}.rewards"
            for reward in section.rewards:
                if not re.fullmatch(r"[A-Za-z0-9_.-]+", reward.label):
                    raise ValueError(f"{key}: the label {reward.label!r} may hold letters, digits, '_', '.', '-' only")
                if reward.label == WEIGHTED_SUM:
                    raise ValueError(f"{key}: {WEIGHTED_SUM!r} is the sum of a task's rewards; choose another label")
                first = seen.setdefault(reward.label, reward)
                if labels.count(reward.label) > 1 or (first.name, first.options) != (reward.name, reward.options):
                    raise ValueError(
                        f"{key}: the label {reward.label!r} stands for two rewards; give one of them another `label`"
                    )

    def place(self, name: str) -> str:
        """The key of a task or probe."""
        return f"{'tasks' if name in self.tasks else 'probes'}.{name}"

    @property
    def text_cache(self) -> Path:
        """The folder of encoded prompts."""
        return self.model.text_cache or self.run.output_dir / "text_cache"

    @property
    @abstractmethod
    def algorithm(self) -> Algorithm:
        """What the run learns by."""

    @property
    def trainer(self) -> str:
        """What runs the rounds, as "module:Class"."""
        return self.algorithm.fused_trainer if self.rollout.mode == "fused" else self.algorithm.trainer

    @property
    @abstractmethod
    def against_fused(self) -> tuple[str, str] | None:
        """Why rollouts cannot train as they go, and what to set; None where they can."""

    @model_validator(mode="after")
    def _can_be_fused(self) -> RunConfig:
        if self.rollout.mode == "fused" and (found := self.against_fused):
            reason, remedy = found
            raise ValueError(f"rollout.mode = 'fused': {reason}; {remedy}set rollout.mode to 'buffered'")
        return self

    def with_mode(self, mode: Literal["buffered", "fused"]) -> Self:
        """The config with this `rollout.mode`."""
        return self.model_copy(update={"rollout": self.rollout.model_copy(update={"mode": mode})})

    @property
    def learns_from_rewards(self) -> bool:
        """Whether rewards decide gradients; otherwise they only monitor."""
        return False

    @property
    def weight_snapshots(self) -> int:
        """Further sets of the trained weights that a run keeps beside the masters."""
        return int(self.student.ema.decay > 0) + self.algorithm.student_snapshots

    @property
    def kept_per_state(self) -> int:
        """Latents that the buffer keeps of every state beside the state itself."""
        return self.algorithm.kept_per_state

    @property
    def frozen_velocities(self) -> int:
        """How many frozen networks are asked at every trained state."""
        return max(len(self.queried_guidances(task)) for task in self.tasks)

    @property
    def group_size(self) -> int:
        """Images of one prompt in a round."""
        return 1

    @property
    def turns(self) -> dict[str, int]:
        """By task, see `opd_ds.config.turns`."""
        return {name: task.turns for name, task in self.tasks.items()}

    def tasks_of(self, index: int) -> list[str]:
        """The tasks of round `index`, counted from 0."""
        return tasks_of_round(self.train.schedule, self.turns, self.run.seed, index)

    def visits(self, index: int, task: str) -> int:
        """Rounds on `task` before round `index`: its prompts are walked through without repetition."""
        return rounds_before(self.train.schedule, self.turns, self.run.seed, index, task)

    def share_of_rounds(self, task: str) -> float:
        """In which part of all rounds a task is trained."""
        return 1.0 if self.train.schedule == "together" else self.tasks[task].turns / sum(self.turns.values())

    def samples(self, task: str) -> int:
        """Trajectories of a task in a round, over all ranks."""
        own = self.tasks[task].samples
        return self.rollout.samples if own is None else own

    def samples_key(self, task: str) -> str:
        """The key that `samples` comes from."""
        return "rollout.samples" if self.tasks[task].samples is None else f"tasks.{task}.samples"

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps."""
        return self.train.inner_epochs * self.train.updates_per_round

    def student_guidance(self, task: str) -> float:
        """The student's guidance scale on a task, in rollout, training and evaluation."""
        own = self.tasks[task].guidance
        return self.rollout.guidance if own is None else own

    def rollout_guidance(self, task: str) -> float:
        """The guidance scale of whoever draws what is trained on."""
        return self.student_guidance(task)

    def queried_guidances(self, task: str) -> list[float]:
        """Guidance scales of the frozen networks that are asked at every trained state of a task."""
        return [self.student_guidance(task)] * self.algorithm.student_snapshots

    def kept_velocities(self, task: str, passes: Callable[[float], int]) -> int:
        """How many velocities of frozen networks are kept of every trained state until training.

        Args:
            passes: of one guided velocity of the run's family, by guidance.
        """
        return len(self.queried_guidances(task))

    def resume_settings(self) -> dict[str, Any]:
        """The settings, by section, that decide a run's numbers; speed settings are left out."""
        data = self.model_dump(mode="json", include=set(self.resume_invariants))
        for key in ("micro_batch", "mode", "gather"):
            data["rollout"].pop(key)
        if self.rollout.negative_every == 1:
            data["rollout"].pop("negative_every")  # as in checkpoints from before there was one
        if not self.rollout.trained_steps.spread:
            data["rollout"]["trained_steps"].pop("spread")  # as in checkpoints from before there was one
        data["student"].pop("gradient_checkpointing")
        if self.student.quantize is None:
            data["student"].pop("quantize")  # as in checkpoints from before there was one
        if self.student.networks == "both":
            data["student"].pop("networks")  # as in checkpoints from before there was one
        data["optimizer"].pop("type")  # in the completed ds_config
        if self.optimizer.min_lr == 0:
            data["optimizer"].pop("min_lr")  # as in checkpoints from before there was one
        if self.optimizer.schedule == "cosine":
            data["run"] = {"rounds": self.run.rounds}  # where it ends
        return data

    @property
    def evaluated(self) -> dict[str, EvaluatedSection]:
        """Tasks, then probes."""
        return {**self.tasks, **self.probes}

    @property
    def rewards(self) -> dict[str, RewardSection]:
        """All rewards by label."""
        return {reward.label: reward for section in self.evaluated.values() for reward in section.rewards}

    @property
    def scoring_micro_batch(self) -> int:
        """Pairs per forward of a frozen network; equal to the training micro-batch unless told otherwise. With `auto`
        what is certain to fit: a round starts above that.
        """
        wanted = self.scoring.micro_batch
        return wanted if isinstance(wanted, int) else self.train.micro_batch

    @property
    def trained_steps(self) -> int:
        """How many of each trajectory."""
        if self.algorithm.trained_window is not None:
            return self.algorithm.trained_window
        chosen = self.rollout.trained_steps
        if chosen.queries is not None:
            return chosen.queries
        return len(chosen.steps) if chosen.steps is not None else int(self.rollout.steps * (chosen.fraction or 0))

    def shows_rollouts(self, index: int) -> bool:
        """Whether somebody looks at the images that are drawn in round `index`, counted from 0, so that they have to be
        finished.
        """
        if self.learns_from_rewards or self.algorithm.drawn_by == "teacher":
            return True
        every, looked_at = self.watch.every, self.watch.rollouts and any(task.rewards for task in self.tasks.values())
        return bool(every and (index + 1) % every == 0 and looked_at)

    def steps_until_trained(self, last: int) -> int:
        """How many steps a rollout takes, that nobody looks at, to train steps up to `last`: the last of them is taken
        only where the transition is trained, or where the rollout's forward is the training's. With random steps in
        fused mode a rollout takes all of them: there micro-batches must hold the same tasks on every rank.
        """
        if self.rollout.mode == "fused" and self.rollout.trained_steps.queries:
            return self.rollout.steps
        return last + (self.rollout.mode == "fused" or self.algorithm.needs_noise)

    @property
    def teachers(self) -> dict[str, TeacherSection]:
        """By task; none where tasks are learned from rewards."""
        return {}

    @property
    def all_teachers(self) -> dict[str, TeacherSection]:
        """By task, and the anchor and the base under `ANCHOR` and `BASE`."""
        return self.teachers

    def with_teachers(self, sections: Mapping[str, TeacherSection]) -> RunConfig:
        """The config with other sections for its teachers, named as in `all_teachers`."""
        return self

    def teacher_key(self, name: str) -> str:
        """The key of a teacher, of the anchor or of the base."""
        return {ANCHOR: "anchor", BASE: "base"}.get(name, f"tasks.{name}.teacher")

    def check_groups(self, key: str) -> None:
        """Raise ValueError where a round's images cannot be compared in groups, as the section `key` does."""
        for name in self.tasks:
            if self.samples(name) % self.group_size:
                raise ValueError(
                    f"{self.samples_key(name)} = {self.samples(name)} is no multiple of {key}.group = "
                    f"{self.group_size}; it counts the images of all prompts of a task and round"
                )

    def check_noise(self, key: str) -> None:
        """Raise ValueError where what `key` names needs noise and the rollout draws none."""
        if self.rollout.noise_level == 0:
            raise ValueError(
                f"{key} weighs drawn transitions by their likelihood, and rollout.noise_level = 0 "
                f"draws none; set a kernel with noise ({', '.join(STOCHASTIC_KERNELS)}) and a noise_level above 0"
            )
