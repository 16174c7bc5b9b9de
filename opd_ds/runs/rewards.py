"""The rewards of a run, built; what they say of themselves is known only then."""

from __future__ import annotations

from opd_ds.config.sections import RewardSection
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.rewards import OfClips, Reward, build, takes_clips


def build_rewards(chosen: dict[str, RewardSection], family: ModelFamily) -> dict[str, Reward]:
    """By label, on the run's device where their options name no other; where the family draws clips, all take clips.

    Raises:
        UserError: a reward cannot be built, or takes clips where the family draws images.
    """
    return {label: _reward(label, section, family) for label, section in chosen.items()}


def _reward(label: str, section: RewardSection, family: ModelFamily) -> Reward:
    if section.frames is not None and not family.draws_clips:
        raise UserError(f"reward {label}: frames = {section.frames}: the model draws images; remove frames")
    reward = build(section.name, **{"device": str(family.device)} | section.options)
    if family.draws_clips:
        return OfClips(reward, section.frames)
    if takes_clips(reward):
        raise UserError(
            f"reward {label}: {section.name} takes clips, the model draws images; give a reward of images, or a model "
            "of videos with model.frames above 1"
        )
    return reward
