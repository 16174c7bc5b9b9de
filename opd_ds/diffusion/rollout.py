"""Rolling out a model's own denoising trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from opd_ds.diffusion import Coefficients, predicted_x0
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.utils.transfer import to_device

# (latents [b, C, ...], sigma [b] float32, rows of the batch, step) -> velocity [b, C, ...]
Predictor = Callable[[Tensor, Tensor, slice, int], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """Where a rollout went.

    Attributes:
        final: [B, C, ...] float32, the clean latents.
        states: [B, T, C, ...], the latents each step started from; None where they were not kept.
        velocity, noise: [B, T, C, ...], what the network said there and the eps that was drawn (0 on a step without
            noise); None where they were not kept.
    """

    final: Tensor
    states: Tensor | None = None
    velocity: Tensor | None = None
    noise: Tensor | None = None

    @staticmethod
    def cat(parts: list[Trajectory]) -> Trajectory:
        def joined(name: str) -> Tensor | None:
            column = [getattr(part, name) for part in parts]
            return None if column[0] is None else torch.cat(column)

        final = torch.cat([part.final for part in parts])
        return Trajectory(final, joined("states"), joined("velocity"), joined("noise"))

    def split(self, sizes: list[int]) -> list[Trajectory]:
        """Consecutive parts of so many samples."""
        columns = (getattr(self, field.name) for field in fields(self))
        parts = [[None] * len(sizes) if column is None else column.split(sizes) for column in columns]
        return [Trajectory(*row) for row in zip(*parts, strict=True)]


def chunks(total: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def rollout(
    predict: Predictor,
    noise: SampleNoise,
    coefficients: Coefficients,
    sigmas: Tensor,
    *,
    micro_batch: int,
    device: torch.device,
    keep: torch.dtype | None = None,
    transitions: bool = False,
) -> Trajectory:
    """Denoise `len(noise)` samples from pure noise along `sigmas` [T+1].

    Latents are carried in float32 between steps. States are kept only when `keep` names a dtype: the network sees them
    in its own anyway, so nothing is lost. With `transitions` velocities and drawn noise are kept as well; together
    they say how likely each transition was without a difference of large numbers.

    `predict` decides about gradients: a plain rollout passes one that runs under no_grad; fused training passes one
    that also accumulates the loss of the step and returns the detached velocity.
    """
    parts = []
    for rows in chunks(len(noise), micro_batch):
        parts.append(_micro_batch(predict, noise, coefficients, sigmas.tolist(), rows, device, keep, transitions))
    return Trajectory.cat(parts)


def _micro_batch(
    predict: Predictor,
    noise: SampleNoise,
    coefficients: Coefficients,
    grid: list[float],
    rows: slice,
    device: torch.device,
    keep: torch.dtype | None,
    transitions: bool,
) -> Trajectory:
    x = to_device(noise.draw(rows), device)
    history: Tensor | None = None
    states, velocities, drawn = [], [], []
    for step in range(len(coefficients)):
        if keep is not None:
            states.append(x.to(keep))
        sigma = torch.full((len(x),), grid[step], device=device)
        velocity = predict(x, sigma, rows, step).float()
        mean = coefficients.mean(step, x, velocity, history)
        history = predicted_x0(x, velocity, grid[step])
        std = float(coefficients.std[step])
        eps = to_device(noise.draw(rows), device) if std > 0 else None
        x = mean if eps is None else mean + std * eps
        if transitions:
            velocities.append(velocity.to(keep))
            drawn.append((torch.zeros_like(x) if eps is None else eps).to(keep))
    stacked = [torch.stack(column, dim=1) if column else None for column in (states, velocities, drawn)]
    return Trajectory(x, *stacked)
