"""Rewards by name. In distillation a reward monitors, and decides no gradient unless `reward_term` asks for it."""

from opd_ds.rewards.base import (
    Metadata,
    Needs,
    Reward,
    RewardUnavailableError,
    Takes,
    batches,
    require,
    require_packages,
)
from opd_ds.rewards.clips import Clip, Drawn, OfClips, takes_clips
from opd_ds.rewards.references import References, score_beside, takes_references
from opd_ds.rewards.registry import build, check, rehearse, reward_class, reward_names, takes_of
from opd_ds.rewards.weights import Weights, WeightsMissingError, WrongWeightsError, weights_root

__all__ = [
    "Clip",
    "Drawn",
    "Metadata",
    "Needs",
    "OfClips",
    "References",
    "Reward",
    "RewardUnavailableError",
    "Takes",
    "Weights",
    "WeightsMissingError",
    "WrongWeightsError",
    "batches",
    "build",
    "check",
    "rehearse",
    "require",
    "require_packages",
    "reward_class",
    "reward_names",
    "score_beside",
    "takes_clips",
    "takes_of",
    "takes_references",
    "weights_root",
]
