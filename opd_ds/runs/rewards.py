"""The rewards of a run: held against what the model draws and the prompts have, and built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opd_ds.config.sections import RewardSection
from opd_ds.data import PromptSet
from opd_ds.errors import UserError
from opd_ds.models import ModelFamily
from opd_ds.rewards import OfClips, Reward, build, takes_clips, takes_of


def build_rewards(chosen: dict[str, RewardSection], family: ModelFamily) -> dict[str, Reward]:
    """By label, on the run's device where their options name no other; where the family draws clips, all take clips.

    Raises:
        UserError: a reward cannot be built, or takes clips where the family draws images.
    """
    return {label: _reward(label, section, family) for label, section in chosen.items()}


def check_rewards(
    sections: Iterable[RewardSection], key: str, family: ModelFamily, sets: Mapping[str, PromptSet]
) -> None:
    """Raise UserError where rewards do not fit what is drawn, or what the prompts that they are asked about have.

    Args:
        key: of the config, where the rewards stand.
        sets: by key of the config.
    """
    for section in sections:
        takes = takes_of(section.name, key, section.options)
        _check_clips(section.label, section, family, clips=takes.clips)
        for place, found in sets.items():
            if takes.references and not found.pictures:
                raise UserError(
                    f"{key}: reward {section.label} looks at reference pictures, and the prompts of {place} have none: "
                    f"say where they stand with {place}.pictures, or leave the reward out"
                )
            for column in takes.columns:
                if lacking := [row for row, given in enumerate(found.metadata) if given.get(column) is None]:
                    raise UserError(
                        f"{key}: reward {section.label} reads the column {column!r}, and {len(lacking)} of "
                        f"{len(found)} prompts of {place} have none, the first: {found.prompts[lacking[0]]!r}; add "
                        "it to the prompt file, or name another one in the reward's options"
                    )


def _check_clips(label: str, section: RewardSection, family: ModelFamily, *, clips: bool) -> None:
    if family.draws_clips:
        return
    if section.frames is not None:
        raise UserError(f"reward {label}: frames = {section.frames}: the model draws images; remove frames")
    if clips:
        raise UserError(
            f"reward {label}: {section.name} takes clips, the model draws images; give a reward of images, or a model "
            "of videos with model.frames above 1"
        )


def _reward(label: str, section: RewardSection, family: ModelFamily) -> Reward:
    _check_clips(label, section, family, clips=False)
    reward = build(section.name, **{"device": str(family.device)} | section.options)
    _check_clips(label, section, family, clips=takes_clips(reward))
    return OfClips(reward, section.frames) if family.draws_clips else reward
