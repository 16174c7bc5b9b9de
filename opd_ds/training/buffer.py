"""What a rollout leaves for training: visited states, the steps chosen for training, and what is known about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_ds.config.schema import TrainedSteps
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Trajectory, chunks
from opd_ds.models import Conditioning


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of (state, step) pairs: rows `sample` and `step`, both int64 [b], of one task's buffer."""

    sample: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(self.sample[rows], self.step[rows])


@dataclass
class TrajectoryBuffer:
    """One task's trajectories on this rank.

    Attributes:
        states: [B, T, C, ...], the dtype the network sees.
        chosen: [B, K] int64, the trained steps of each trajectory.
        weights: [B] float32, 1 for a sample, 0 for one that only fills up the rank's share or does not count.
        cond: the B encoded prompts.
        kept: by name [B, T, C, ...], what else is known of every state.
        scored: by name, velocities at the chosen pairs, one tensor per forward of scoring, as networks gave them.
        per_sample: by name [B], what is known of every sample.
    """

    states: Tensor
    chosen: Tensor
    weights: Tensor
    cond: Conditioning
    per_state: dict[str, Tensor] = field(default_factory=dict)
    per_pair: dict[str, list[Tensor]] = field(default_factory=dict)
    per_sample: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> Pairs:
        """All of them, sample by sample; the order of scoring and of training."""
        count, picks = self.chosen.shape
        return Pairs(torch.arange(count).repeat_interleave(picks), self.chosen.flatten())

    def micro_batches(self, size: int) -> list[Pairs]:
        """All pairs in micro-batches of `size`."""
        pairs = self.pairs
        return [pairs[rows] for rows in chunks(len(pairs), size)]

    def inputs(self, pairs: Pairs, sigmas: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """States [b, C, ...], their sigma [b] float32 and their prompts."""
        device = self.states.device
        sample, step = pairs.sample.to(device), pairs.step.to(device)
        return self.states[sample, step], sigmas.to(device, torch.float32)[step], self.cond[sample]

    def training_batches(self, size: int) -> Iterator[tuple[Pairs, dict[str, Tensor]]]:
        """Training micro-batches of `size` with everything that is known of them, by name: velocities and the like
        [b, C, ...], numbers per sample [b].
        """
        device = self.states.device
        scored = {name: torch.cat(parts) for name, parts in self.per_pair.items()}
        start = 0
        for pairs in self.micro_batches(size):
            rows = slice(start, start + len(pairs.sample))
            sample, step = pairs.sample.to(device), pairs.step.to(device)
            known = {name: velocity[rows] for name, velocity in scored.items()}
            known |= {name: values[sample, step] for name, values in self.per_state.items()}
            known |= {name: values[sample] for name, values in self.per_sample.items()}
            yield pairs, known
            start = rows.stop


def noised_states(final: Tensor, noise: SampleNoise, sigmas: Tensor, dtype: torch.dtype) -> Trajectory:
    """Clean latents [B, C, ...], noised afresh to each of `sigmas` [T+1] but the last.

    Returns:
        states x = (1 - sigma) x0 + sigma eps, and under `velocity` what flow matching asks for there: eps - x0; both
        [B, T, C, ...] in `dtype`.
    """
    states, velocity = [], []
    for sigma in sigmas.tolist()[:-1]:
        eps = noise.draw(slice(None)).to(final.device)
        states.append(((1 - sigma) * final + sigma * eps).to(dtype))
        velocity.append((eps - final).to(dtype))
    return Trajectory(final, torch.stack(states, 1), torch.stack(velocity, 1))


def choose_steps(
    setting: TrainedSteps, steps: int, seed: int, round_index: int, task: str, indices: list[int]
) -> Tensor:
    """The trained steps of the samples `indices`: int64 [B, K]; random queries are named by the sample."""
    if setting.queries is not None:
        likely = _low_noise(steps) if setting.favour == "low_noise" else torch.ones(steps, dtype=torch.float64)
        drawn = []
        for index in indices:
            generator = torch.Generator().manual_seed(sample_seed(seed, round_index, f"{task}/queries", index))
            drawn.append(torch.multinomial(likely, setting.queries, generator=generator).sort().values)
        return torch.stack(drawn)
    if setting.steps is not None:
        fixed = torch.tensor(sorted(setting.steps))
    else:
        assert setting.fraction is not None
        fixed = torch.arange(int(steps * setting.fraction))
    return fixed.expand(len(indices), -1)


def _low_noise(steps: int) -> Tensor:
    """Beta(5, 2) over the trajectory's length, which DanceOPD (arXiv 2606.27377) asks at: its mass on each step [T]."""
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (6 * edges**5 - 5 * edges**6).diff()  # the regularised incomplete beta function I_x(5, 2)
