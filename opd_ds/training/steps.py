"""Which steps of each trajectory are trained."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from opd_ds.config.sections import TrainedSteps
from opd_ds.diffusion.noise import sample_seed

_TRAJECTORIES = 2**14  # over which a mean is taken: it is right to a hundredth of a step


def choose_steps(
    setting: TrainedSteps, steps: int, seed: int, round_index: int, task: str, indices: list[int]
) -> Tensor:
    """The trained steps of the samples `indices`: int64 [B, K], ascending; random queries are named by the sample."""
    if setting.queries is None:
        return _fixed(setting, steps).expand(len(indices), -1)
    drawn = []
    for index in indices:
        generator = torch.Generator().manual_seed(sample_seed(seed, round_index, f"{task}/queries", index))
        drawn.append(_draw(setting, steps, 1, generator))
    return torch.cat(drawn)


@cache
def last_steps(setting: TrainedSteps, steps: int) -> Tensor:
    """The last trained steps of trajectories, int64: one where all have the same, else many that were drawn."""
    if setting.queries is None:
        return _fixed(setting, steps).max()[None]
    return _draw(setting, steps, _TRAJECTORIES, torch.Generator().manual_seed(0))[:, -1]


def _fixed(setting: TrainedSteps, steps: int) -> Tensor:
    if setting.steps is not None:
        return torch.tensor(sorted(setting.steps))
    assert setting.fraction is not None
    return torch.arange(int(steps * setting.fraction))


def _draw(setting: TrainedSteps, steps: int, count: int, generator: torch.Generator) -> Tensor:
    """Random queries of `count` trajectories: int64 [count, K], ascending."""
    assert setting.queries is not None
    if setting.spread:
        points = torch.rand(count, 1, dtype=torch.float64, generator=generator) + torch.arange(setting.queries)
        return torch.searchsorted(_line(setting, steps), points, right=True).clamp_max(steps - 1)
    likely = _LIKELY[setting.favour](steps)
    return torch.multinomial(likely.expand(count, -1), setting.queries, generator=generator).sort(dim=1).values


@cache
def _line(setting: TrainedSteps, steps: int) -> Tensor:
    """Where steps end [T] on a line on which each is as long as it is likely to be among a trajectory's K: K times its
    share, at most 1. Points at distance 1 from a random start (systematic sampling) meet no step twice.
    """
    likely, queries = _LIKELY[setting.favour](steps), setting.queries or 0
    length, room = torch.ones_like(likely), torch.ones_like(likely, dtype=torch.bool)
    while bool(room.any()):
        length[room] = likely[room] / likely[room].sum() * (queries - int((~room).sum()))
        if not bool((length > 1).any()):
            break
        room &= length < 1
        length[~room] = 1.0
    return length.cumsum(0)


def _even(steps: int) -> Tensor:
    return torch.ones(steps, dtype=torch.float64)


def _low_noise(steps: int) -> Tensor:
    """Beta(5, 2) over the trajectory's length, which DanceOPD (arXiv 2606.27377) asks at: its mass on each step [T]."""
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (6 * edges**5 - 5 * edges**6).diff()  # the regularised incomplete beta function I_x(5, 2)


def _high_noise(steps: int) -> Tensor:
    """The mirror image, Beta(2, 5)."""
    return _low_noise(steps).flip(0)


_LIKELY = {"none": _even, "low_noise": _low_noise, "high_noise": _high_noise}
