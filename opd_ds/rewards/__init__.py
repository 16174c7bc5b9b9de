"""Rewards by name, imported only when asked for. In distillation a reward monitors; it never decides a gradient."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from PIL import Image

from opd_ds.errors import UserError, nearest


class Reward(Protocol):
    """Judges pictures. An item that cannot be judged is NaN, never 0."""

    name: str

    def score(
        self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """One float32 score per picture: [B]."""
        ...


_REWARDS = {
    "miniature_text": "opd_ds.miniature.rewards:TextReward",
    "miniature_composition": "opd_ds.miniature.rewards:CompositionReward",
    "miniature_look": "opd_ds.miniature.rewards:LookReward",
}


def reward_names() -> list[str]:
    return list(_REWARDS)


def check_name(name: str, key: str) -> None:
    """Raise UserError when there is no such reward."""
    if name not in _REWARDS:
        raise UserError(f"{key} = {name!r}: unknown reward; allowed: {', '.join(_REWARDS)}.{nearest(name, _REWARDS)}")


def build(name: str) -> Reward:
    """The reward `name`, its weights loaded.

    Raises:
        UserError: unknown name.
    """
    check_name(name, "reward")
    module, attribute = _REWARDS[name].split(":")
    return getattr(importlib.import_module(module), attribute)()
