"""The closed form against the PPO-style estimator of the paper."""

from __future__ import annotations

import torch

from opd_ds.diffusion import gaussian_kl, ppo_style_loss, velocity_error


def test_ppo_style_gradient_is_unbiased_but_noisy() -> None:
    """Its mean over noise draws is the closed-form gradient; a single draw is far from it."""
    torch.manual_seed(0)
    std, b, count = 0.2, -0.3, 200_000
    teacher = torch.randn(3)
    start = teacher + 0.3 * torch.randn(3)

    closed = start.clone().requires_grad_()
    gaussian_kl(b * closed[None], b * teacher[None], std).sum().backward()

    velocity = start.expand(count, 3).clone().requires_grad_()
    noise, tables = torch.randn(count, 3), (torch.full((count,), b), torch.full((count,), std))
    ppo_style_loss(velocity, start.expand(count, 3), teacher.expand(count, 3), noise, *tables).sum().backward()
    assert closed.grad is not None
    assert velocity.grad is not None
    spread = velocity.grad.std(0)
    torch.testing.assert_close(velocity.grad.mean(0), closed.grad, rtol=0, atol=float(5 * spread.max() / count**0.5))
    assert (spread > 0.1 * closed.grad.abs().mean()).all()


def test_velocity_error_is_a_mean_and_teaches_only_the_student() -> None:
    student = torch.randn(3, 4, 2, 2, requires_grad=True)
    teacher = torch.randn(3, 4, 2, 2, requires_grad=True)
    error = velocity_error(student, teacher)
    torch.testing.assert_close(error, (student - teacher).square().mean((1, 2, 3)))
    error.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
