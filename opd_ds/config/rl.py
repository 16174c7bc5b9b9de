"""The config of a run that learns from rewards."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from opd_ds.config.schema import STOCHASTIC_KERNELS, RewardSection, RunConfig, Section, TrainedSection, TrainedSteps


class WeightedReward(RewardSection):
    weight: float = Field(1.0, description="factor on this reward in the sum that is learned from")


class LearnedSection(TrainedSection):
    """A task that is learned from its rewards."""

    rewards: tuple[WeightedReward, ...] = Field(
        min_length=1, description="their weighted sum is learned from; the first is the headline"
    )
    turns: PositiveInt = Field(1, description="rounds in a row on this task where tasks alternate")


class OldPolicySection(Section):
    """The policy that NFT samples with follows the trained one: after each round old = d * old + (1 - d) * new with
    d = min(rate * max(0, s - start), maximum), s counting optimizer steps
    (in fp16 those that were skipped too).
    """

    start: NonNegativeInt = 0
    rate: float = Field(0.001, ge=0)
    maximum: float = Field(0.5, ge=0, lt=1)


class _FromRewards(Section):
    """What both algorithms need."""

    group: int = Field(24, ge=2, description="pictures of one prompt, compared with each other")
    advantage_std: Literal["batch", "group"] = Field("batch", description="whose deviation scales the advantages")
    advantage_clip: PositiveFloat = 5.0
    reward_attempts: PositiveInt = Field(
        3, description="calls of a reward before pictures without a score are left out"
    )
    schedule: Literal["together", "alternate"] = Field(
        "together", description="with several tasks: all in every round, or one after the other"
    )


class NftSection(_FromRewards):
    """DiffusionNFT (arXiv 2509.16117)."""

    algorithm: Literal["nft"]
    beta: PositiveFloat = Field(1.0, description="how far the implicit policies stand from the old one")
    optimality: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = Field(
        "all", description="which advantages count"
    )
    kl: float = Field(1e-4, ge=0, description="factor on the squared velocity distance to the start; 0: none is kept")
    old_policy: OldPolicySection = OldPolicySection()


class GuardSection(_FromRewards):
    """GRPO-Guard (arXiv 2510.22319) on Flow-GRPO (arXiv 2505.05470)."""

    algorithm: Literal["guard"]
    clip: PositiveFloat = Field(1e-4, description="of the likelihood ratio, on both sides of 1")
    ratio: Literal["normalized", "plain"] = Field("normalized", description="plain is Flow-GRPO's own")
    step_weighting: Literal["none", "inverse_dt"] = Field(
        "none", description="inverse_dt divides by a step's length, as GRPO-Guard's code does: short steps count more"
    )
    window: PositiveInt | None = Field(
        None, description="only so many steps in a row, from a random one on, draw noise and are trained; default: all"
    )
    kl: float = Field(0.0, ge=0, description="factor on the exact KL per step to the start; 0: no start is kept")


class TeachConfig(RunConfig):
    """A specialist by reinforcement learning: `opd-ds teach`."""

    resume_invariants: ClassVar[tuple[str, ...]] = (*RunConfig.resume_invariants, "teach")

    teach: Annotated[NftSection | GuardSection, Field(discriminator="algorithm")]
    tasks: dict[str, LearnedSection] = Field(min_length=1)

    @property
    def weight_snapshots(self) -> int:
        return super().weight_snapshots + self.frozen_velocities

    @property
    def frozen_velocities(self) -> int:
        return (self.teach.algorithm == "nft") + (self.teach.kl > 0)

    @property
    def trained_steps(self) -> int:
        window = self.teach.window if isinstance(self.teach, GuardSection) else None
        return window or super().trained_steps

    @model_validator(mode="after")
    def _consistent(self) -> TeachConfig:
        rollout, teach = self.rollout, self.teach
        if rollout.samples % teach.group:
            raise ValueError(
                f"rollout.samples = {rollout.samples} is no multiple of teach.group = {teach.group}; it counts the "
                "pictures of all prompts of a task and round"
            )
        if self.scoring.micro_batch == "auto":
            raise ValueError(
                "scoring.micro_batch = 'auto' may come out differently on each rank, but frozen policies are asked "
                "through the student, whose forwards may be collective; give a number"
            )
        if rollout.mode == "fused":
            raise ValueError("rollout.mode = 'fused': rewards come after a rollout; set it to 'buffered'")
        if isinstance(teach, GuardSection):
            self._check_guard(teach)
        return self

    def _check_guard(self, teach: GuardSection) -> None:
        rollout = self.rollout
        if rollout.noise_level == 0:
            raise ValueError(
                "teach.algorithm = 'guard' weighs drawn transitions by their likelihood, and rollout.noise_level = 0 "
                f"draws none; set a kernel with noise ({', '.join(STOCHASTIC_KERNELS)}) and a noise_level above 0"
            )
        if teach.window is None:
            return
        if rollout.trained_steps != TrainedSteps(fraction=1.0):
            raise ValueError("teach.window says which steps are trained; leave rollout.trained_steps out")
        if teach.window > rollout.steps:
            raise ValueError(f"teach.window = {teach.window}: a trajectory has only {rollout.steps} steps")
