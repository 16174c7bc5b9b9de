"""The tasks' rewards, computed on the image. All in [0, 1], without unit; NaN for a prompt they do not know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opd_ds.miniature import assets, editing, world
from opd_ds.miniature.reader import FILE as READER_FILE
from opd_ds.miniature.reader import load_reader
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.utils.hashing import file_sha256

_SIDE_COLUMNS = [0, 1, world.SIZE - 2, world.SIZE - 1]
_INK_PIXELS = 20


def _pictures(images: list[Image.Image]) -> Tensor:
    """[B, 3, 16, 16] in [0, 1]."""
    size = (world.SIZE, world.SIZE)
    arrays = [np.asarray(image.convert("RGB").resize(size), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def _side_median(pictures: Tensor) -> Tensor:
    """[B, 3]."""
    return pictures[..., _SIDE_COLUMNS].flatten(2).median(dim=2).values


def _ground_and_ink(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Estimated colours, [B, 3] each: the median of the side columns, the mean of the pixels farthest from it."""
    ground = _side_median(pictures)
    pixels = pictures.flatten(2)
    distance = (pixels - ground[:, :, None]).square().sum(1)
    farthest = distance.topk(_INK_PIXELS, dim=1).indices
    ink = pixels.gather(2, farthest[:, None].expand(-1, 3, -1)).mean(2)
    return ground, ink


def _colours_kept(pictures: Tensor, asked: list[tuple[str, str] | None]) -> Tensor:
    """[B]: 1 where ink and ground are exactly those that are asked for, see `CompositionReward`; NaN where none are."""
    ground, ink = _ground_and_ink(pictures)
    names = list(world.COLOURS)
    score = torch.ones(len(pictures))
    for place, found in enumerate((ink, ground)):
        wanted = torch.tensor([names.index(colours[place]) if colours else 0 for colours in asked])
        distances = torch.cdist(found, world.palette())
        distance = distances.gather(1, wanted[:, None])[:, 0]
        nearest = distances.argmin(1) == wanted
        score = score * torch.where(nearest, torch.exp(-((distance / 0.4) ** 2)), torch.zeros(()))
    return torch.where(torch.tensor([colours is not None for colours in asked]), score, torch.tensor(torch.nan))


class TextReward:
    """Probability that the reader gives to the prompted digit. Range [0, 1]."""

    name = "miniature_text"
    needs: ClassVar[Needs] = Needs()

    def __init__(self, folder: str | Path | None = None) -> None:
        self._file = Path(folder or assets()) / READER_FILE
        self._reader = load_reader(self._file.parent)

    def identity(self) -> dict[str, Any]:
        return {"engine": "miniature reader", "sha256": file_sha256(self._file)}

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        probabilities = self._reader(_pictures(images)).softmax(1)
        asked = [world.parse(prompt) for prompt in prompts]
        return torch.stack(
            [
                p[scene.digit] if scene else torch.tensor(torch.nan)
                for p, scene in zip(probabilities, asked, strict=True)
            ]
        )


class CompositionReward:
    """Whether ink and ground have the prompted colours: 1 when both are exact, falling with the distance in RGB.

    A colour nearer to another colour of the palette than to the prompted one makes the score 0. Range [0, 1].
    """

    name = "miniature_composition"
    needs: ClassVar[Needs] = Needs()

    def identity(self) -> dict[str, Any]:
        return {"engine": "miniature composition, closed form"}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        asked = [world.parse(prompt) for prompt in prompts]
        return _colours_kept(_pictures(images), [(scene.ink, scene.ground) if scene else None for scene in asked])


class LookReward:
    """How well the image is drawn: two colours of the palette, a sharp contour, a thin stroke that turns. Range [0, 1].

    The side columns name the ground, the nearest colour of the palette. Of the other colours the ink is the one for
    which the pixels are nearest to the segment between the two; a pixel's place on that segment, 0 at the ground and 1
    at the ink, is how much of it is covered. Then

        min(1, turn / 16) * exp(-(dirt / 0.1)^2 - (blur / 1.2)^2 - (bulk / 0.15)^2 - (stain / 0.1)^2 - (speckle / 15)^2)

    - turn: sum over the image of the coverage's changes from row to row. A vertical stripe has none.
    - dirt: rms distance of the pixels from the segment, in RGB.
    - blur: half-covered pixels, sum of 4 m (1 - m), per pixel of contour, in excess of 2.5. It catches pale ink as
      well, since ink that is not of the palette covers its pixels by half.
    - bulk: the ink that no ground touches (of every pixel the least covered of its 3 x 3), as a share of all ink, in
      excess of 0.38. A pen's line has little.
    - stain: mean coverage of the side columns in excess of 0.05.
    - speckle: sum of the coverage's changes along both axes in excess of 65.

    The limits are those of real drawings, which score near 1 whatever the digit and the colours: beyond them nothing is
    won, so that a plainer drawing is no better one.
    """

    name = "miniature_look"
    needs: ClassVar[Needs] = Needs()

    def identity(self) -> dict[str, Any]:
        return {"engine": "miniature look, closed form", "version": 2}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32; the prompts are not read."""
        pictures = _pictures(images)
        cover, dirt = _coverage(pictures)
        down, right = cover.diff(dim=1), cover.diff(dim=2)
        turn, across = down.abs().sum((1, 2)), right.abs().sum((1, 2))
        contour = (down[:, :, :-1].square() + right[:, :-1].square()).sqrt().sum((1, 2))
        blur = 4 * (cover * (1 - cover)).sum((1, 2)) / contour.clamp_min(1) - 2.5
        inner = -F.max_pool2d(-F.pad(cover[:, None], (1, 1, 1, 1)), 3, 1)
        bulk = inner.sum((1, 2, 3)) / cover.sum((1, 2)).clamp_min(1) - 0.38
        stain = cover[..., _SIDE_COLUMNS].mean((1, 2)) - 0.05
        speckle = turn + across - 65
        faults = [(dirt, 0.1), (blur, 1.2), (bulk, 0.15), (stain, 0.1), (speckle, 15)]
        total = torch.stack([(fault.clamp_min(0) / scale).square() for fault, scale in faults]).sum(0)
        return (turn / 16).clamp(max=1) * torch.exp(-total)


class AllTasksReward:
    """Product of the three: the digit is read, in the prompted colours, and well drawn. Range [0, 1]."""

    name = "miniature_all"
    needs: ClassVar[Needs] = Needs()

    def __init__(self, folder: str | Path | None = None) -> None:
        self._parts = (TextReward(folder), CompositionReward(), LookReward())

    def identity(self) -> dict[str, Any]:
        return {part.name: part.identity() for part in self._parts}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        return torch.stack([part.score(images, prompts, metadata) for part in self._parts]).prod(0)


class EditReward:
    """Whether the reference picture's drawing has the ink that the instruction asks for, and is what it was otherwise.

    The product of three: the composition reward for that ink on the picture's own ground, the probability that the
    reader gives to the digit that it reads in the picture, and the overlap of the drawings: of the ink's coverage of
    both images, the sum of the lesser over the sum of the greater. Range [0, 1].
    """

    name = "miniature_edit"
    needs: ClassVar[Needs] = Needs()
    takes_references: ClassVar[bool] = True

    def __init__(self) -> None:
        self._file = assets() / READER_FILE
        self._reader = load_reader(self._file.parent)

    def identity(self) -> dict[str, Any]:
        return {"engine": "miniature edit, closed form and reader", "sha256": file_sha256(self._file)}

    @torch.no_grad()
    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: Sequence[tuple[Image.Image, ...]] | None = None,
    ) -> Tensor:
        """[B] float32; NaN for a prompt that is no instruction or has no picture."""
        given = references or [()] * len(images)
        asked = [editing.parse(prompt) if own else None for prompt, own in zip(prompts, given, strict=True)]
        before = _pictures([own[0] if own else image for image, own in zip(images, given, strict=True)])
        after = _pictures(images)
        names = list(world.COLOURS)
        grounds = torch.cdist(_side_median(before), world.palette()).argmin(1).tolist()
        wanted = [(ink, names[ground]) if ink else None for ink, ground in zip(asked, grounds, strict=True)]
        digit = self._reader(before).argmax(1)
        read = self._reader(after).softmax(1).gather(1, digit[:, None])[:, 0]
        drawn, kept = (_coverage(pictures)[0].flatten(1) for pictures in (before, after))
        overlap = torch.minimum(drawn, kept).sum(1) / torch.maximum(drawn, kept).sum(1).clamp_min(1e-6)
        return _colours_kept(after, wanted) * read * overlap


def _coverage(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage by ink [B, 16, 16] in [0, 1], and the rms distance [B] from the two colours' segment."""
    palette, rows = world.palette(), torch.arange(len(pictures))
    ground = torch.cdist(_side_median(pictures), palette).argmin(1)
    axes = palette - palette[ground][:, None]  # [B, 6, 3], zero for the ground itself
    offset = pictures.flatten(2) - palette[ground][:, :, None]
    covers = (axes @ offset / axes.square().sum(2, keepdim=True).clamp_min(1e-9)).clamp(0, 1)
    distance = (offset[:, None] - covers[:, :, None] * axes[..., None]).square().sum(2).mean(2).sqrt()
    distance[rows, ground] = torch.inf
    ink = distance.argmin(1)
    return covers[rows, ink].unflatten(1, pictures.shape[2:]), distance[rows, ink]
