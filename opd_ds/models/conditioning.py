"""Encoded prompts and reference pictures, as networks take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

References = tuple[Tensor, ...]  # of one prompt: the latents [C, h, w] of each picture


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: named tensors with one row per prompt, as the family's network takes them.

    Where prompts differ in length, `tensors` has a boolean `mask` [B, L]; tensors as long as it are padded with zeros.

    Args:
        known_lengths: `lengths`, where they are known; otherwise the mask is read, for which the device is waited for.

    Attributes:
        references: of each row, the latents of its pictures; empty where no row has any. The rows of one forward have
            equally many, of equal shapes.
        negative: the same rows with their negative prompts, where that is not one for all rows.
        lengths: tokens of each prompt, by the mask, on the host: forwards need them. Empty where there is no mask.
    """

    tensors: dict[str, Tensor]
    known_lengths: InitVar[tuple[int, ...] | None] = None
    references: tuple[References, ...] = ()
    negative: Conditioning | None = None
    lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self, known_lengths: tuple[int, ...] | None) -> None:
        if known_lengths is None:
            mask = self.tensors.get("mask")
            known_lengths = () if mask is None else tuple(mask.sum(1).tolist())
        object.__setattr__(self, "lengths", known_lengths)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice) -> Conditioning:
        return self._rows(lambda tensor: tensor[rows], lambda column: column[rows])

    def select(self, index: Tensor, rows: Sequence[int]) -> Conditioning:
        """The rows `index` int64 [b], on the device of the tensors, and the same numbers on the host."""
        return self._rows(
            lambda tensor: tensor[index], lambda column: tuple(column[row] for row in rows) if column else ()
        )

    def to(self, device: torch.device) -> Conditioning:
        moved = tuple(tuple(one.to(device) for one in own) for own in self.references)
        return self._rows(lambda tensor: tensor.to(device), lambda column: column).with_references(moved)

    def with_references(self, references: tuple[References, ...], negative: Conditioning | None = None) -> Conditioning:
        """The same texts beside other pictures."""
        return replace(self, known_lengths=self.lengths, references=references, negative=negative)

    def expand(self, count: int) -> Conditioning:
        """A single encoded prompt repeated `count` times, without copying."""
        return self._rows(lambda tensor: tensor.expand(count, *tensor.shape[1:]), lambda column: column * count)

    def apart(self) -> list[Conditioning]:
        """Each row alone."""
        return [self[slice(row, row + 1)] for row in range(len(self))]

    def stacked_references(self) -> list[Tensor]:
        """The first pictures of all rows [B, C, h, w], the second ones, and so on."""
        return [torch.stack(column) for column in zip(*self.references, strict=True)]

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """All rows in order; where the parts are of different lengths, padded to the longest.

        Raises:
            ValueError: parts that are not encoded alike, such as prompts with and without a picture that CLIP sees.
        """
        for part in parts[1:]:
            if part.tensors.keys() != parts[0].tensors.keys():
                raise ValueError(f"rows with {sorted(parts[0].tensors)} beside rows with {sorted(part.tensors)}")
        negatives = [part.negative for part in parts if part.negative is not None]
        return Conditioning(
            {name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors},
            tuple(length for part in parts for length in part.lengths),
            _joined([(len(part), part.references) for part in parts]),
            Conditioning.cat(negatives) if negatives else None,
        )

    def _rows(self, of_tensor: Callable[[Tensor], Tensor], of_column: Callable[[Any], Any]) -> Conditioning:
        return Conditioning(
            {name: of_tensor(tensor) for name, tensor in self.tensors.items()},
            of_column(self.lengths),
            of_column(self.references),
            None if self.negative is None else self.negative._rows(of_tensor, of_column),
        )


def _joined(parts: list[tuple[int, tuple[References, ...]]]) -> tuple[References, ...]:
    """References of all rows, by part: how many rows it has, and theirs, which a part without pictures lacks."""
    if not any(references for _, references in parts):
        return ()
    return tuple(own for count, references in parts for own in references or ((),) * count)


def _cat(parts: list[Tensor]) -> Tensor:
    if parts[0].ndim > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts]
    return torch.cat(parts)
