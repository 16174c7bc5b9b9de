"""From rewards to what is learned from: how much better an image is than others of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Optimality = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


def weighted_sum(rewards: Tensor, weights: Sequence[float], scale: Literal["none", "deviation"]) -> Tensor:
    """What is learned from: rewards [N, R] to float64 [N], NaN where one of them is NaN.

    With `deviation` every reward is first divided by its (population) deviation over all images, unless that is 0.
    """
    values = rewards.double()
    if scale == "deviation":
        spread = torch.stack([own[torch.isfinite(own)].std(correction=0) for own in values.T])
        values = values / torch.where(spread > 0, spread, 1.0)  # false for the NaN of no values, too
    return values @ torch.tensor(weights, dtype=torch.float64)


def group_advantages(rewards: Tensor, group: int, std: Literal["batch", "group"], eps: float = 1e-4) -> Tensor:
    """(reward - mean of its group) / (standard deviation + eps), the (population) deviation that of all rewards or of
    the group.

    Args:
        rewards: [N], consecutive `group` of one prompt; NaN where an image has no score.

    Returns:
        float64 [N], 0 where the reward is NaN or has nothing to be compared with.
    """
    by_prompt = rewards.double().view(-1, group)
    scored = torch.isfinite(by_prompt)
    count = scored.sum(1, keepdim=True)
    values = torch.where(scored, by_prompt, 0.0)
    offset = torch.where(scored, values - values.sum(1, keepdim=True) / count.clamp_min(1), 0.0)
    if std == "group":
        spread = (offset.square().sum(1, keepdim=True) / count.clamp_min(1)).sqrt()
    else:
        everything = rewards.double()[torch.isfinite(rewards)]
        spread = everything.std(correction=0) if len(everything) else torch.zeros((), dtype=torch.float64)
    return torch.where(count > 1, offset / (spread + eps), 0.0).flatten()


def equal_groups(rewards: Tensor, group: int) -> int:
    """How many groups teach nothing: all their rewards are equal, or fewer than two images have one.

    Args:
        rewards: [N], consecutive `group` of one prompt; NaN where an image has no score.
    """
    by_prompt = rewards.view(-1, group)
    scored = torch.isfinite(by_prompt)
    highest = torch.where(scored, by_prompt, -torch.inf).amax(1)
    lowest = torch.where(scored, by_prompt, torch.inf).amin(1)
    return int((highest <= lowest).sum())


def optimality(advantages: Tensor, clip: float, mode: Optimality = "all") -> Tensor:
    """DiffusionNFT's probability r in [0, 1] of a good image (arXiv 2509.16117): clamp(A / clip, -1, 1) / 2 + 1/2.

    r = 1/2 teaches nothing. `positive_only` and `negative_only` cut the other side of A off, `one_only` counts every A
    above 0 as 1, `binary` keeps the sign of A.
    """
    chosen = {
        "all": advantages,
        "positive_only": advantages.clamp(min=0),
        "negative_only": advantages.clamp(max=0),
        "one_only": (advantages > 0).to(advantages.dtype),
        "binary": advantages.sign(),
    }[mode]
    return (chosen / clip).clamp(-1, 1) / 2 + 0.5
