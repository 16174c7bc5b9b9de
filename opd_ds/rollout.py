"""Rolling out a model's own denoising trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.diffusion import TransitionKernel
from opd_ds.prompts import SampleNoise

# (latents [b, C, h, w], sigma [b] float32, rows of the batch, step) -> velocity [b, C, h, w]
Predictor = Callable[[Tensor, Tensor, slice, int], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """`states` [B, T, C, h, w]: the latents each step started from, in `dtype`; `final` [B, C, h, w]: float32."""

    states: Tensor | None
    final: Tensor


def chunks(total: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def rollout(
    predict: Predictor,
    noise: SampleNoise,
    kernel: TransitionKernel,
    sigmas: Tensor,
    *,
    micro_batch: int,
    device: torch.device,
    states_dtype: torch.dtype | None = None,
) -> Trajectory:
    """Denoise `len(noise)` samples from pure noise along `sigmas` [T+1].

    Latents are carried in float32 between steps. States are kept only when `states_dtype` is given: the network sees
    them in that dtype anyway, so nothing is lost.

    `predict` decides about gradients: a plain rollout passes one that runs under no_grad; fused training passes one
    that also accumulates the loss of the step and returns the detached velocity.
    """
    coefficients = kernel.coefficients(sigmas)
    grid = sigmas.tolist()
    states, finals = [], []
    for rows in chunks(len(noise), micro_batch):
        x = noise.draw(rows).to(device)
        history: Tensor | None = None
        kept = []
        for step in range(len(coefficients)):
            if states_dtype is not None:
                kept.append(x.to(states_dtype))
            sigma = torch.full((len(x),), grid[step], device=device)
            velocity = predict(x, sigma, rows, step).float()
            mean = coefficients.mean(step, x, velocity, history)
            history = kernel.history(x, velocity, grid[step])
            std = float(coefficients.std[step])
            x = mean + std * noise.draw(rows).to(device) if std > 0 else mean
        finals.append(x)
        if kept:
            states.append(torch.stack(kept, dim=1))
    return Trajectory(torch.cat(states) if states else None, torch.cat(finals))
