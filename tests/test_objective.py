"""The closed form against the PPO-style estimator of the paper."""

from __future__ import annotations

import pytest
import torch

from opd_ds.diffusion import gaussian_kl, ppo_style_loss, velocity_error


def test_ppo_style_gradient_is_unbiased_but_noisy() -> None:
    """Its mean over noise draws is the closed-form gradient; a single draw is far from it."""
    torch.manual_seed(0)
    std, count = 0.2, 200_000
    teacher = torch.randn(3, dtype=torch.float64)
    start = teacher + 0.1 * torch.randn(3, dtype=torch.float64)

    closed = start.clone().requires_grad_()
    gaussian_kl(closed[None], teacher[None], std).sum().backward()

    samples = start + std * torch.randn(count, 3, dtype=torch.float64)
    mean = start.expand(count, 3).clone().requires_grad_()
    ppo_style_loss(mean, start.expand(count, 3), teacher.expand(count, 3), samples, std).sum().backward()
    assert closed.grad is not None
    assert mean.grad is not None
    spread = mean.grad.std(0)
    torch.testing.assert_close(mean.grad.mean(0), closed.grad, rtol=0, atol=float(5 * spread.max() / count**0.5))
    assert (spread > 0.1 * closed.grad.abs().mean()).all()


def test_ppo_style_needs_noise() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="stochastic"):
        ppo_style_loss(x, x, x, x, 0.0)


def test_velocity_error_is_a_mean_and_teaches_only_the_student() -> None:
    student = torch.randn(3, 4, 2, 2, requires_grad=True)
    teacher = torch.randn(3, 4, 2, 2, requires_grad=True)
    error = velocity_error(student, teacher)
    torch.testing.assert_close(error, (student - teacher).square().mean((1, 2, 3)))
    error.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
