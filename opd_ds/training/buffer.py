"""What a rollout leaves for training: visited states, the steps chosen for training, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from opd_ds.config.sections import TrainedSteps
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import chunks
from opd_ds.models import Conditioning
from opd_ds.utils.transfer import to_device

Known_co = TypeVar("Known_co", covariant=True)


@dataclass(frozen=True)
class Pairs:
    """(state, step) pairs of one task's buffer: rows `sample` and `step`, both int64 [b], on its device; `rows` says
    which of all the buffer's pairs they are, `host_sample` is `sample` on the host.
    """

    sample: Tensor
    step: Tensor
    rows: slice
    host_sample: list[int]

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class PerState:
    """What is known of every state of every trajectory: [B, T, C, ...]."""

    values: Tensor

    def at(self, pairs: Pairs) -> Tensor:
        return self.values[pairs.sample, pairs.step]


@dataclass(frozen=True)
class PerPair:
    """What is known of every chosen pair, in the order of `TrajectoryBuffer.pairs`: [P, C, ...]."""

    values: Tensor

    def at(self, pairs: Pairs) -> Tensor:
        return self.values[pairs.rows]


@dataclass(frozen=True)
class PerSample:
    """What is known of every trajectory: [B]."""

    values: Tensor

    def at(self, pairs: Pairs) -> Tensor:
        return self.values[pairs.sample]


Column = PerState | PerPair | PerSample


@dataclass(frozen=True)
class Columns(Generic[Known_co]):
    """What a loss knows of one task's pairs.

    Attributes:
        kind: what the loss takes, a dataclass.
        columns: its fields, by name; one that is missing has its default.
    """

    kind: Callable[..., Known_co]
    columns: Mapping[str, Column]

    def at(self, pairs: Pairs) -> Known_co:
        return self.kind(**{name: column.at(pairs) for name, column in self.columns.items()})


def named(**columns: Column | None) -> dict[str, Column]:
    """Those that are there."""
    return {name: column for name, column in columns.items() if column is not None}


@dataclass(frozen=True)
class TrajectoryBuffer:
    """One task's trajectories on this rank.

    Attributes:
        states: [B, T, C, ...], the dtype the network sees.
        chosen: [B, K] int64, the trained steps of each trajectory.
        weights: [B] float32, on the device of `states`, 1 for a sample, 0 for one that only pads the rank's part or
            does not count.
        cond: the B encoded prompts.
    """

    states: Tensor
    chosen: Tensor
    weights: Tensor
    cond: Conditioning

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", to_device(self.weights, self.states.device))

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, list[int]]:
        """All chosen pairs, sample by sample, on the device once; the samples on the host as well."""
        count, picks = self.chosen.shape
        sample, device = torch.arange(count).repeat_interleave(picks), self.states.device
        return to_device(sample, device), to_device(self.chosen.flatten(), device), sample.tolist()

    @property
    def pair_count(self) -> int:
        return self.chosen.numel()

    def pairs(self, rows: slice) -> Pairs:
        """Some of all chosen pairs, sample by sample: the order of queries and of training."""
        sample, step, host_sample = self._pairs
        return Pairs(sample[rows], step[rows], rows, host_sample[rows])

    def micro_batches(self, size: int) -> list[Pairs]:
        """All chosen pairs in micro-batches of `size`."""
        return [self.pairs(rows) for rows in chunks(self.pair_count, size)]

    def inputs(self, pairs: Pairs, sigmas: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """States [b, C, ...], their sigma [b] and prompts; `sigmas` float32 [T+1], on the device of the states."""
        cond = self.cond.select(pairs.sample, pairs.host_sample)
        return self.states[pairs.sample, pairs.step], sigmas[pairs.step], cond


@dataclass(frozen=True)
class NoisedStates:
    """Clean latents at every noise level: `states`, and `flow` = eps - x0, what flow matching asks for there; both
    [B, T, C, ...].
    """

    states: Tensor
    flow: Tensor


def noised_states(final: Tensor, noise: SampleNoise, sigmas: Tensor, dtype: torch.dtype) -> NoisedStates:
    """Clean latents [B, C, ...], noised afresh to each of `sigmas` [T+1] but the last: x = (1 - sigma) x0 + sigma eps,
    in `dtype`.
    """
    states, flow = [], []
    for sigma in sigmas.tolist()[:-1]:
        eps = to_device(noise.draw(slice(None)), final.device)
        states.append(((1 - sigma) * final + sigma * eps).to(dtype))
        flow.append((eps - final).to(dtype))
    return NoisedStates(torch.stack(states, 1), torch.stack(flow, 1))


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
