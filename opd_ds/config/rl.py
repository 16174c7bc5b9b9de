"""Algorithms that learn from rewards, and the tasks that they learn."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from opd_ds.config.base import Algorithm, Section
from opd_ds.config.sections import TrainedSection, WeightedReward


class LearnedSection(TrainedSection):
    """A task that is learned from its rewards."""

    rewards: tuple[WeightedReward, ...] = Field(
        min_length=1, description="their weighted sum is learned from, and is the headline"
    )

    @model_validator(mode="after")
    def _something_is_learned(self) -> LearnedSection:
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing would be learned; give one of them another weight")
        return self

    @property
    def summed(self) -> dict[str, float]:
        """All rewards, where there are several."""
        return {reward.label: reward.weight for reward in self.rewards} if len(self.rewards) > 1 else {}


class OldPolicySection(Section):
    """The policy that NFT samples with follows the trained one: after each round old = d * old + (1 - d) * new with
    d = min(rate * max(0, s - start), maximum), s counting optimizer steps (in fp16 those that were skipped too).
    """

    start: NonNegativeInt = Field(0, description="optimizer steps before d rises; until then old = new")
    rate: float = Field(0.001, ge=0, description="by which d rises at every optimizer step")
    maximum: float = Field(0.5, ge=0, lt=1, description="that d reaches")


class GroupSection(Section):
    """How much better an image is than others of its prompt."""

    group: int = Field(24, ge=2, description="images of one prompt, compared with each other")
    reward_scale: Literal["none", "deviation"] = Field(
        "none",
        description="deviation: each reward is divided by its own deviation over the round's images of the task before "
        "it is weighted, so that equal weights are equal influence",
    )
    advantage_std: Literal["batch", "group"] = Field("batch", description="whose deviation scales the advantages")
    advantage_clip: PositiveFloat = Field(5.0, description="advantages are cut off at this value on both sides of 0")
    reward_attempts: PositiveInt = Field(3, description="calls of a reward before images without a score are left out")


class RatioSection(Section):
    """The clipped policy gradient of GRPO-Guard (arXiv 2510.22319) and Flow-GRPO (arXiv 2505.05470)."""

    clip: PositiveFloat = Field(1e-4, description="of the likelihood ratio, on both sides of 1")
    ratio: Literal["normalized", "plain"] = Field("normalized", description="plain is Flow-GRPO's own")
    step_weighting: Literal["none", "inverse_dt"] = Field(
        "none", description="inverse_dt divides by a step's length, as GRPO-Guard's code does: short steps count more"
    )


class RewardTermSection(RatioSection, GroupSection):
    """GRPO-Guard's policy gradient from the tasks' rewards beside the distillation, on the same transitions and in the
    same forwards. Velocities and drawn noise of every trained state are kept.
    """

    kept_per_state: ClassVar[int] = 2

    weight: PositiveFloat = Field(description="factor on the policy gradient's loss beside the distillation's")


class RewardAlgorithm(GroupSection, Algorithm):
    """What algorithms that learn from rewards have in common; `algorithm` is its name."""

    title: ClassVar[str] = "Reinforcement learning"

    algorithm: str


class NftSection(RewardAlgorithm):
    """DiffusionNFT (arXiv 2509.16117). The flow at every noised state is kept."""

    trainer: ClassVar[str] = "opd_ds.training.rl.nft:NftTrainer"
    kept_per_state: ClassVar[int] = 1

    algorithm: Literal["nft"]
    beta: PositiveFloat = Field(1.0, description="how far the implicit policies stand from the old one")
    optimality: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = Field(
        "all", description="which advantages count"
    )
    kl: float = Field(1e-4, ge=0, description="factor on the squared velocity distance to the start; 0: none is kept")
    old_policy: OldPolicySection = OldPolicySection()

    @property
    def student_snapshots(self) -> int:
        """The old policy; the start where distance to it costs."""
        return 1 + (self.kl > 0)


class GuardSection(RatioSection, RewardAlgorithm):
    """GRPO-Guard (arXiv 2510.22319) on Flow-GRPO (arXiv 2505.05470). Velocities and drawn noise of every state are
    kept.
    """

    trainer: ClassVar[str] = "opd_ds.training.rl.grpo_guard:GrpoGuardTrainer"
    kept_per_state: ClassVar[int] = 2

    algorithm: Literal["guard"]
    window: PositiveInt | None = Field(
        None, description="only so many steps in a row, from a random one on, draw noise and are trained; default: all"
    )
    kl: float = Field(0.0, ge=0, description="factor on the exact KL per step to the start; 0: no start is kept")

    @property
    def student_snapshots(self) -> int:
        """The start where distance to it costs."""
        return int(self.kl > 0)

    @property
    def needs_noise(self) -> bool:
        return True

    @property
    def trained_window(self) -> int | None:
        return self.window
