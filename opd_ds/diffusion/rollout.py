"""Rolling out a model's own denoising trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from opd_ds.diffusion import Coefficients, predicted_x0
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.utils.transfer import to_device


@dataclass(frozen=True)
class Rows:
    """Some samples of a rollout, in ascending order: on the host, and the same int64 [b] on the device."""

    host: list[int]
    device: Tensor

    @staticmethod
    def of(rows: list[int], device: torch.device) -> Rows:
        return Rows(rows, to_device(torch.tensor(rows), device))


# (latents [b, C, ...], sigma [b] float32, whose they are, step) -> velocity [b, C, ...]
Predictor = Callable[[Tensor, Tensor, Rows, int], Tensor]
# (step, places int64 [p] on the host, states [p, C, ...]), see `Keep`
Told = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class MicroBatch:
    """Samples that are denoised together.

    Attributes:
        rows: in ascending order.
        steps: how many steps each of them takes; a sample that has taken its steps leaves the batch.
    """

    rows: list[int]
    steps: list[int]

    @property
    def length(self) -> int:
        """Steps that the longest takes, so many forwards there are."""
        return max(self.steps)

    def of_length(self, length: int) -> MicroBatch:
        """The same with so many forwards: the longest goes on until then."""
        longest = self.steps.index(self.length)
        return replace(self, steps=[*self.steps[:longest], length, *self.steps[longest + 1 :]])

    def whole(self, steps: int) -> MicroBatch:
        """The same where every sample takes all `steps`."""
        return replace(self, steps=[steps] * len(self.rows))


def micro_batches(steps: Sequence[int], size: int) -> list[MicroBatch]:
    """Samples that take `steps[row]` steps, in micro-batches of at most `size`: those that go on for longest are
    together, so that a forward has few rows only at the end of a micro-batch. Samples of one length stay in order.
    """
    order = sorted(range(len(steps)), key=lambda row: -steps[row])
    together = [sorted(order[rows]) for rows in chunks(len(order), size)]
    return [MicroBatch(rows, [steps[row] for row in rows]) for rows in together]


def in_step(steps: Sequence[Sequence[int]], size: int, rank: int) -> list[MicroBatch]:
    """The micro-batches of `rank`, where those of all ranks have the same numbers of forwards, as ZeRO-3 needs.

    Args:
        steps: by rank, how many steps each of its samples takes; equally many samples on all ranks.
    """
    everywhere = [micro_batches(own, size) for own in steps]
    lengths = [max(part.length for part in column) for column in zip(*everywhere, strict=True)]
    return [part.of_length(length) for part, length in zip(everywhere[rank], lengths, strict=True)]


class KeptLatents:
    """What is kept of the states at chosen steps: `values` [B, K, C, ...].

    Args:
        chosen: int64 [B, K] on the host, no step twice in a row.
        shape: of one latent.
        told: as in `Keep`.
    """

    def __init__(
        self,
        chosen: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        told: Told | None = None,
    ) -> None:
        self._chosen, self._told = chosen, told
        self.values = torch.empty(*chosen.shape, *shape, dtype=dtype, device=device)

    def put(self, step: int, rows: list[int], values: Tensor) -> None:
        """`values` [b, C, ...] of the samples `rows` at `step`; kept of those that chose it."""
        chosen = self._chosen[rows]
        own, slot = (chosen == step).nonzero(as_tuple=True)
        if len(own) == 0 and self._told is None:
            return
        places = torch.tensor(rows)[own] * chosen.shape[1] + slot
        if len(own) < len(rows):
            values = values[to_device(own, values.device)]
        values = values.to(self.values.dtype)
        if len(own) > 0:
            self.values.flatten(0, 1).index_copy_(0, to_device(places, values.device), values)
        if self._told is not None:
            self._told(step, places, values)


@dataclass(frozen=True)
class Keep:
    """What a rollout keeps: the states at `chosen` int64 [B, K], on the host, in the dtype that the network sees
    anyway; with `transitions` also what the network said there and the noise that was drawn, which together say how
    likely each transition was without a difference of large numbers.

    `told` hears of the states as they are visited, once a step and micro-batch, whether any was chosen or not: their
    step, their places int64 [p] among all B * K, on the host, and the states [p, C, ...]. As many calls on every rank.
    """

    chosen: Tensor
    dtype: torch.dtype
    transitions: bool = False
    told: Told | None = None

    def columns(self, shape: tuple[int, ...], device: torch.device) -> list[KeptLatents]:
        """Of the states, and of velocities and noise where they are kept."""
        told = (self.told, None, None) if self.transitions else (self.told,)
        return [KeptLatents(self.chosen, shape, self.dtype, device, one) for one in told]


@dataclass(frozen=True)
class Trajectory:
    """Where a rollout went.

    Attributes:
        final: [B, C, ...] float32, the latents after a sample's last step: clean where it took all.
        states: [B, K, C, ...], the latents that the kept steps started from; None where none were kept.
        velocity, noise: [B, K, C, ...], what the network said there and the eps that was drawn (0 on a step without
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
    parts: Sequence[MicroBatch] | None = None,
    *,
    device: torch.device,
    keep: Keep | None = None,
) -> Trajectory:
    """Denoise `len(noise)` samples from pure noise along `sigmas` [T+1]; latents are carried in float32 between steps.

    `predict` decides about gradients: a plain rollout passes one that runs under no_grad; fused training passes one
    that also accumulates the loss of the step and returns the detached velocity.

    Args:
        parts: of the samples, each in one of them; None: all together, every step.
    """
    count, steps = len(noise), len(coefficients)
    if parts is None:
        parts = [MicroBatch(list(range(count)), [steps] * count)]
    final = torch.empty(count, *noise.shape, dtype=torch.float32, device=device)
    kept = keep.columns(noise.shape, device) if keep is not None else []
    for part in parts:
        _micro_batch(predict, noise, coefficients, sigmas.tolist(), part, final, kept)
    return Trajectory(final, *(column.values for column in kept))


def _micro_batch(
    predict: Predictor,
    noise: SampleNoise,
    coefficients: Coefficients,
    grid: list[float],
    part: MicroBatch,
    final: Tensor,
    kept: list[KeptLatents],
) -> None:
    """Fills the part's rows of `final`, and of `kept`: states, and velocities and noise where there are three."""
    device, left = final.device, dict(zip(part.rows, part.steps, strict=True))
    rows, x = Rows.of(part.rows, device), to_device(noise.draw(part.rows), device)
    history: Tensor | None = None
    for step in range(part.length + 1):
        for column in kept[:1]:
            column.put(step, rows.host, x)
        staying = [place for place, row in enumerate(rows.host) if left[row] > step]
        if len(staying) < len(rows.host):
            final.index_copy_(0, rows.device, x)  # of those that stay, too: overwritten when they leave
            if not staying:
                return
            index = to_device(torch.tensor(staying), device)
            rows, x = Rows([rows.host[place] for place in staying], rows.device[index]), x[index]
            history = None if history is None else history[index]
        sigma = torch.full((len(x),), grid[step], dtype=torch.float32, device=device)
        velocity = predict(x, sigma, rows, step).float()
        mean = coefficients.mean(step, x, velocity, history)
        history = predicted_x0(x, velocity, grid[step])
        std = float(coefficients.std[step])
        eps = to_device(noise.draw(rows.host), device) if std > 0 else None
        x = mean if eps is None else mean + std * eps
        for column, values in zip(kept[1:], (velocity, torch.zeros_like(x) if eps is None else eps), strict=False):
            column.put(step, rows.host, values)
