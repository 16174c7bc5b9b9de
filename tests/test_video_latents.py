"""Nothing between noise and loss knows how many dimensions a latent has.

With as many samples as channels a number per sample that is shaped for images, [B, 1, 1, 1], broadcasts over a
video's channels without an error; so a video's latent and the same numbers as an image's have to give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.rl import GuardSection, NftSection
from opd_ds.diffusion import gaussian_kl, kernel, kernel_names
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Keep, Rows, Trajectory, micro_batches, rollout
from opd_ds.models import Conditioning
from opd_ds.training.buffer import TrajectoryBuffer, noised_states
from opd_ds.training.objectives import ClosedFormLoss, DrawnTransitions, PolicyGradientLoss, TeacherVelocities
from opd_ds.training.rl.grpo_guard import GrpoGuardKnown, GrpoGuardLoss
from opd_ds.training.rl.nft import NftKnown, NftLoss
from tests.tiny import run_settings

CPU = torch.device("cpu")
SAMPLES = CHANNELS = FRAMES = 3
VIDEO, PICTURE = (CHANNELS, FRAMES, 2, 4), (CHANNELS, FRAMES * 2, 4)
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
TABLE = kernel("flow", 0.7).coefficients(SIGMAS)
STEPS = torch.tensor([1, 3, 2])


def as_picture(video: Tensor) -> Tensor:
    """[..., C, f, h, w] to [..., C, f * h, w]."""
    return video.flatten(-3, -2)


def known(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    numbers = {"advantage": torch.tensor([0.5, -1.0, 2.0]), "optimality": torch.tensor([0.1, 0.9, 0.6])}
    return {
        name: numbers[name] if name in numbers else torch.randn(SAMPLES, *VIDEO, generator=generator) for name in names
    }


def distillation(tmp_path: Path, kind: type[ClosedFormLoss], **changes: Any) -> ClosedFormLoss:
    settings = run_settings(tmp_path, tmp_path, rollout__kernel="flow", rollout__noise_level=0.7, **changes)
    return kind(DistilConfig.model_validate(settings), TABLE, SIGMAS, CPU)


# The loss, what it knows as a dataclass, and the names of that.
LOSSES: dict[str, Callable[[Path], tuple[Any, type, dict[str, Tensor]]]] = {
    "closed form": lambda folder: (
        distillation(folder, ClosedFormLoss, anchor={"path": "x", "weight": 0.5}),
        TeacherVelocities,
        known("teacher", "anchor"),
    ),
    "PPO-style": lambda folder: (
        distillation(folder, PolicyGradientLoss, objective__method="ppo"),
        DrawnTransitions,
        known("teacher", "velocity", "noise"),
    ),
    "NFT": lambda folder: (
        NftLoss(NftSection(algorithm="nft", beta=0.3, kl=0.2), SIGMAS, CPU),
        NftKnown,
        known("old", "flow", "start", "optimality"),
    ),
    "GRPO-Guard": lambda folder: (
        GrpoGuardLoss(GuardSection(algorithm="guard", kl=0.2), TABLE, SIGMAS, range(len(TABLE)), CPU),
        GrpoGuardKnown,
        known("velocity", "noise", "start", "advantage"),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_a_video_is_that_of_the_same_numbers_as_a_picture(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loss, kind, of_video = LOSSES[name](tmp_path)
    of_picture = {key: as_picture(value) if value.ndim > 1 else value for key, value in of_video.items()}
    # Near the policy that drew, where there is one: far from it ratios are clipped.
    behaviour = of_video.get("velocity", torch.zeros(SAMPLES, *VIDEO))
    velocity = (behaviour + 0.02 * torch.randn(SAMPLES, *VIDEO)).requires_grad_()
    video, measured = loss(velocity, STEPS, kind(**of_video))
    picture, expected = loss(as_picture(velocity), STEPS, kind(**of_picture))
    assert video.shape == (SAMPLES,)
    assert len(set(video.tolist())) == SAMPLES
    torch.testing.assert_close(video, picture)
    assert measured.keys() == expected.keys()
    for key, value in measured.items():
        torch.testing.assert_close(value, expected[key])
    by_sample = [torch.autograd.grad(video[row], velocity, retain_graph=True)[0] for row in range(SAMPLES)]
    for row, gradient in enumerate(by_sample):
        others = torch.arange(SAMPLES) != row
        assert gradient[others].abs().sum() == 0


@pytest.mark.parametrize("name", kernel_names())
def test_a_rollout_takes_the_same_way(name: str) -> None:
    stochastic = name in kernel_names(stochastic=True)
    table = kernel(name, 0.6 if stochastic else 0.0).coefficients(SIGMAS)

    def rolled(shape: tuple[int, ...]) -> Trajectory:
        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            assert x.shape[1:] == shape
            return torch.stack([torch.sin(one * (1 + level)) for one, level in zip(x, sigma, strict=True)])

        noise = SampleNoise([1, 2, 3], shape)
        keep = Keep(torch.arange(len(table)).expand(3, -1), torch.float32, transitions=True)
        return rollout(predict, noise, table, SIGMAS, micro_batches([len(table)] * 3, 2), device=CPU, keep=keep)

    video, picture = rolled(VIDEO), rolled(PICTURE)
    for part in ("final", "states", "velocity", "noise"):
        torch.testing.assert_close(as_picture(getattr(video, part)), getattr(picture, part))


def test_noised_states_and_the_buffer_keep_samples_and_steps_apart() -> None:
    final, chosen = torch.randn(SAMPLES, *VIDEO), torch.tensor([[0, 2], [1, 3], [2, 3]])
    video = noised_states(final, SampleNoise([1, 2, 3], VIDEO), SIGMAS, chosen, torch.float32)
    picture = noised_states(as_picture(final), SampleNoise([1, 2, 3], PICTURE), SIGMAS, chosen, torch.float32)
    assert video.states is not None
    assert picture.states is not None
    torch.testing.assert_close(as_picture(video.states), picture.states)
    prompts = Conditioning({"x": torch.arange(SAMPLES)})
    buffer = TrajectoryBuffer(video.states, chosen, torch.ones(SAMPLES), prompts, SIGMAS.float())
    for pairs in buffer.micro_batches(4):
        states, sigma, cond = buffer.inputs(pairs)
        assert torch.equal(cond.tensors["x"], pairs.sample)
        for row, (sample, step) in enumerate(zip(pairs.sample, pairs.step, strict=True)):
            slot = chosen[sample].tolist().index(step)
            assert torch.equal(states[row], video.states[sample, slot])
            assert sigma[row] == SIGMAS[step].float()


def test_the_kl_of_a_video_is_the_sum_over_all_its_dimensions() -> None:
    ours, theirs = torch.randn(SAMPLES, *VIDEO), torch.randn(SAMPLES, *VIDEO)
    torch.testing.assert_close(gaussian_kl(ours, theirs, 0.5), gaussian_kl(as_picture(ours), as_picture(theirs), 0.5))
