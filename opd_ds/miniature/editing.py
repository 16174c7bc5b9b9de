"""The miniature's edits: a picture of a digit, and an instruction that asks for another ink and nothing else.

The pictures are those of `world.py`; training and held-out edits are of different drawings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.miniature import world

_PHRASE = "recolour the digit {ink}"
_PATTERN = re.compile(_PHRASE.format(ink="(.+)"))


def instruction(ink: str) -> str:
    return _PHRASE.format(ink=ink)


def parse(prompt: str) -> str | None:
    """The ink that `prompt` asks for, or None when it is no instruction of this world."""
    match = _PATTERN.fullmatch(prompt)
    return match[1] if match and match[1] in world.COLOURS else None


@dataclass(frozen=True)
class Edits:
    """Pictures [N, 3, 16, 16] in [0, 1] before and after; the ink after [N] (palette rows)."""

    before: Tensor
    after: Tensor
    ink: Tensor

    @property
    def prompts(self) -> list[str]:
        names = list(world.COLOURS)
        return [instruction(names[ink]) for ink in self.ink.tolist()]


def random_edits(masks: Tensor, count: int, generator: torch.Generator, *, soiled: float) -> Edits:
    """Of masks [M, 16, 16]; a share `soiled` has blotches afterwards, before all are clean."""
    drawn = masks[torch.randint(len(masks), (count,), generator=generator)]
    colours = torch.rand(count, len(world.COLOURS), generator=generator).argsort(1)  # three of each row, all different
    old, new, ground = (world.palette()[colours[:, place]] for place in range(3))
    dirty = torch.rand(count, generator=generator) < soiled
    after = world.soil(world.paint(drawn, new, ground), world.strengths(dirty, generator), generator)
    return Edits(world.paint(drawn, old, ground), after, colours[:, 1])
