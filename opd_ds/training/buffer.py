"""What a rollout leaves for training: visited states, the steps chosen for training, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import KeptLatents, chunks
from opd_ds.models import Conditioning
from opd_ds.training.stages import StagePairs, in_stages
from opd_ds.utils.transfer import to_device

Known_co = TypeVar("Known_co", covariant=True)


@dataclass(frozen=True)
class Pairs:
    """(state, step) pairs of one task's buffer: rows `sample` and `step`, both int64 [b], on its device; `rows` says
    which of all the buffer's pairs they are, `host_sample` is `sample` on the host, `stage` which of the model's
    networks is asked at them. `counts` float32 [b], on the device: 0 where a pair only pads; None: all count.
    `host_index` int64 [b] is `rows` on the host, where it is no slice.
    """

    sample: Tensor
    step: Tensor
    rows: slice | Tensor
    host_sample: list[int]
    stage: int = 0
    counts: Tensor | None = None
    host_index: Tensor | None = None

    @property
    def host_rows(self) -> slice | Tensor:
        """`rows` on the host."""
        if isinstance(self.rows, slice):
            return self.rows
        assert self.host_index is not None
        return self.host_index

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class PerState:
    """What was kept of the chosen states of every trajectory: [B, K, C, ...]."""

    values: Tensor

    def at(self, pairs: Pairs) -> Tensor:
        return self.values.flatten(0, 1)[pairs.rows]

    def by_sample(self, count: int) -> Tensor:
        """[B, ...] of `count` samples."""
        return self.values

    @classmethod
    def of_samples(cls, rows: Tensor) -> PerState:
        """What `by_sample` gave."""
        return cls(rows)


@dataclass(frozen=True)
class PerPair:
    """What is known of every chosen pair, in the order of `TrajectoryBuffer.pairs`: [P, C, ...]."""

    values: Tensor

    def at(self, pairs: Pairs) -> Tensor:
        return self.values[pairs.rows]

    def by_sample(self, count: int) -> Tensor:
        """[B, K, C, ...] of `count` samples."""
        return self.values.unflatten(0, (count, -1))

    @classmethod
    def of_samples(cls, rows: Tensor) -> PerPair:
        """What `by_sample` gave."""
        return cls(rows.flatten(0, 1))


@dataclass(frozen=True)
class PerSample:
    """What is known of every trajectory: [B, ...]."""

    values: Tensor

    def at(self, pairs: Pairs) -> Tensor:
        return self.values[pairs.sample]

    def by_sample(self, count: int) -> Tensor:
        """[B, ...] of `count` samples."""
        return self.values

    @classmethod
    def of_samples(cls, rows: Tensor) -> PerSample:
        """What `by_sample` gave."""
        return cls(rows)


class Column(Protocol):
    """What is known of pairs: one of the above, or what is to become one."""

    def at(self, pairs: Pairs) -> Tensor:
        """Of some pairs: [b, ...]."""
        ...

    def by_sample(self, count: int) -> Tensor:
        """[B, ...] of `count` samples."""
        ...


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
    """A share's trajectories on this rank.

    Attributes:
        states: [B, K, C, ...], where the trained steps started from, in the dtype the network sees.
        chosen: [B, K] int64, these steps, on the host.
        weights: [B] float32, on the device of `states`, 1 for a sample, 0 for one that only pads the rank's part or
            does not count.
        cond: the B encoded prompts.
        sigmas: float32 [T+1], on the device of `states`, what the network hears of each step.
        stages: of a model with two networks, which is asked at each step.
        stage_counts: then, how many pairs each network has.
        order: int64 [B * K] on the host, the pairs in the order in which they are to be trained on; None: sample by
            sample.
    """

    states: Tensor
    chosen: Tensor
    weights: Tensor
    cond: Conditioning
    sigmas: Tensor
    stages: tuple[int, ...] = ()
    stage_counts: tuple[int, ...] = ()
    order: Tensor | None = None

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
        """The chosen pairs in micro-batches of `size`."""
        if self.stage_counts:
            return [self.pairs_of(part, rows) for part in self.by_stage() for rows in chunks(len(part), size)]
        one = self.pairs if self.order is None else self._in_order
        return [one(rows) for rows in chunks(self.pair_count, size)]

    def _in_order(self, rows: slice) -> Pairs:
        """Some of the pairs in `order`."""
        assert self.order is not None
        index, device = self.order[rows], self.states.device
        sample, step = index // self.chosen.shape[1], self.chosen.flatten()[index]
        places = to_device(index, device)
        return Pairs(to_device(sample, device), to_device(step, device), places, sample.tolist(), host_index=index)

    def by_stage(self) -> list[StagePairs]:
        """The pairs, network by network."""
        return in_stages(self.chosen.flatten(), self.stages, self.stage_counts)

    def pairs_of(self, part: StagePairs, rows: slice) -> Pairs:
        """Some of the pairs of one network."""
        index, device = part.index[rows], self.states.device
        sample = index // self.chosen.shape[1]
        return Pairs(
            to_device(sample, device),
            to_device(part.step[rows], device),
            to_device(index, device),
            sample.tolist(),
            part.stage,
            to_device(part.counts[rows].float(), device),
            index,
        )

    def weights_of(self, pairs: Pairs) -> Tensor:
        """How much each of them counts: float32 [b]."""
        weights = self.weights[pairs.sample]
        return weights if pairs.counts is None else weights * pairs.counts

    def inputs(self, pairs: Pairs) -> tuple[Tensor, Tensor, Conditioning]:
        """States [b, C, ...], their sigma [b] and prompts."""
        cond = self.cond.select(pairs.sample, pairs.host_sample)
        return self.states.flatten(0, 1)[pairs.rows], self.sigmas[pairs.step], cond


@dataclass(frozen=True)
class NoisedStates:
    """Clean latents at the chosen noise levels of each: `states`, and `flow` = eps - x0, what flow matching asks for
    there; both [B, K, C, ...].
    """

    states: Tensor
    flow: Tensor


def noised_states(
    final: Tensor, noise: SampleNoise, sigmas: Tensor, chosen: Tensor, dtype: torch.dtype
) -> NoisedStates:
    """Clean latents [B, C, ...], noised afresh to the `chosen` int64 [B, K] of `sigmas` [T+1]: x = (1 - sigma) x0 +
    sigma eps, in `dtype`. Every step has noise of its own, whichever are chosen.
    """
    shape, device = tuple(final.shape[1:]), final.device
    states, flow = KeptLatents(chosen, shape, dtype, device), KeptLatents(chosen, shape, dtype, device)
    rows = list(range(len(final)))
    for step, sigma in enumerate(sigmas.tolist()[:-1]):
        eps = to_device(noise.draw(slice(None)), device)
        states.put(step, rows, (1 - sigma) * final + sigma * eps)
        flow.put(step, rows, eps - final)
    return NoisedStates(states.values, flow.values)
