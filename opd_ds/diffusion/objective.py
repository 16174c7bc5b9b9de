"""The objective: a weight per step times a velocity error.

At the same state two models' next means differ by b * (v_S - v_T) and nothing else (see `kernels`), so

    KL(student || teacher) = b^2 / (2 std^2) * ||v_S - v_T||^2      std > 0     (DiffusionOPD, arXiv 2605.15055, Eq. 11)
    mean matching          = b^2 / 2         * ||v_S - v_T||^2      std = 0     (Eq. 12)

A sum over latent dimensions in the paper; here the mean over them is used (as its public code does), so that the
figure does not depend on the image's size. Multiply by the number of latent dimensions to get nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd_ds.diffusion.kernels import Coefficients

Target = Literal["transition", "velocity", "x0"]
Weighting = Literal["kl", "uniform", "normalized"]


def mean_matching(coefficients: Coefficients) -> Tensor:
    """Weight [T], float64, of Eq. 12: b^2 / 2."""
    return coefficients.b**2 / 2


def kl_weight(coefficients: Coefficients) -> Tensor:
    """Weight [T], float64, of Eq. 11: b^2 / (2 std^2); on a step without noise (std = 0) b^2 / 2, Eq. 12."""
    noisy = coefficients.std > 0
    variance = torch.where(noisy, coefficients.std, torch.ones_like(coefficients.std)) ** 2
    return coefficients.b**2 / (2 * variance)


def step_weights(coefficients: Coefficients, sigmas: Tensor, target: Target, weighting: Weighting) -> Tensor:
    """Weights [T], float64, on the squared velocity error of each step.

    `target` says which quantity is compared: the transition's mean (b * v), the velocity, or the predicted image
    x0 (sigma * v). `weighting` says how steps weigh against each other: `kl` as the paper (transition only),
    `uniform` the plain half squared error of the target, `normalized` the same scaled to a mean of 1 over the steps.

    Raises:
        ValueError: `kl` with another target than `transition`.
    """
    if weighting == "kl":
        if target != "transition":
            raise ValueError(f"weighting 'kl' belongs to target 'transition', not {target!r}")
        return kl_weight(coefficients)
    sigma = sigmas[:-1].to(torch.float64).cpu()
    scale = {"transition": coefficients.b, "velocity": torch.ones_like(sigma), "x0": sigma}[target]
    weights = scale**2 / 2
    return weights / weights.mean() if weighting == "normalized" else weights


def velocity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared velocity difference per sample: [B, ...] twice to float32 [B]. The teacher gets no gradient."""
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)


def gaussian_kl(student_mean: Tensor, teacher_mean: Tensor, std: Tensor | float) -> Tensor:
    """KL in nats between N(student_mean, std^2) and N(teacher_mean, std^2), summed over all but the first dim: [B]."""
    return ((student_mean - teacher_mean) / std).square().flatten(1).sum(1) / 2


def log_ratio(velocity: Tensor, behaviour: Tensor, noise: Tensor, b: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(x') - log pi_behaviour(x') at x' = mean_behaviour + std * noise, in two forms, as means over latents: [B].

    With D = mean - mean_behaviour = b * (v - v_behaviour) it is mean(D * noise) / std - mean(D^2) / (2 std^2).
    Returned are mean(D * noise), which GRPO-Guard (arXiv 2510.22319) takes for it (mean zero over the noise, one scale
    at all steps), and the log-ratio itself. `velocity`, `behaviour`, `noise` [B, ...]; `b`, `std` [B].
    """
    difference = b.view(-1, *[1] * (velocity.ndim - 1)) * (velocity.float() - behaviour.float())
    along = (difference * noise.float()).flatten(1).mean(1)
    return along, along / std - difference.square().flatten(1).mean(1) / (2 * std**2)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho * A, clip(rho, 1 - clip, 1 + clip) * A): [B] each."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def ppo_style_loss(
    velocity: Tensor, behaviour: Tensor, teacher: Tensor, noise: Tensor, b: Tensor, std: Tensor, clip: float = 1e-4
) -> Tensor:
    """The policy-gradient estimator that the paper compares with (its section on PPO-style training), for comparison.

    The teacher is a process reward: A = -KL(student || teacher) of this transition in nats (not detached: detached it
    has no expected gradient on-policy), and the loss is -min(rho * A, clip(rho, 1 - clip, 1 + clip) * A) per sample,
    with rho the likelihood ratio, under student and behaviour policy, of the transition that was drawn with `noise`. In
    expectation the gradient equals that of the closed-form KL; the score-function part only adds variance.

    Args:
        velocity, behaviour, teacher: of student, behaviour policy and teacher at the same states, [B, ...].
        noise: that the transition drew, [B, ...].
        b, std: of the step, [B], std > 0.

    Returns:
        [B], in nats.
    """
    dimensions = velocity[0].numel()
    advantage = -(b**2 / (2 * std**2)) * velocity_error(velocity, teacher) * dimensions
    _, mean_log_ratio = log_ratio(velocity, behaviour, noise, b, std)
    return clipped_surrogate((dimensions * mean_log_ratio).exp(), advantage, clip)
