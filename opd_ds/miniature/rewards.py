"""The three tasks' rewards, computed on the image. All in [0, 1], without unit; NaN for a prompt they do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opd_ds.miniature import assets, world
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


def _ground_and_ink(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Estimated colours, [B, 3] each: the median of the side columns, the mean of the pixels farthest from it."""
    ground = pictures[..., _SIDE_COLUMNS].flatten(2).median(dim=2).values
    pixels = pictures.flatten(2)
    distance = (pixels - ground[:, :, None]).square().sum(1)
    farthest = distance.topk(_INK_PIXELS, dim=1).indices
    ink = pixels.gather(2, farthest[:, None].expand(-1, 3, -1)).mean(2)
    return ground, ink


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
        ground, ink = _ground_and_ink(_pictures(images))
        asked = [world.parse(prompt) for prompt in prompts]
        names = list(world.COLOURS)
        score = torch.ones(len(images))
        for found, part in ((ink, "ink"), (ground, "ground")):
            wanted = torch.tensor([names.index(getattr(scene, part)) if scene else 0 for scene in asked])
            distances = torch.cdist(found, world.palette())
            distance = distances.gather(1, wanted[:, None])[:, 0]
            nearest = distances.argmin(1) == wanted
            score = score * torch.where(nearest, torch.exp(-((distance / 0.4) ** 2)), torch.zeros(()))
        return torch.where(torch.tensor([scene is not None for scene in asked]), score, torch.tensor(torch.nan))


class LookReward:
    """How cleanly the image is made: one ink on one flat ground, with contrast between them. Range [0, 1].

    A drawing of this world has only colours on the segment between its ground and its ink. The score is

        exp(-(off / 0.12)) * min(1, contrast / 0.35),      off = rms distance of the pixels from that segment, plus
                                                           the rms distance of the side columns from the ground,

    so speckle and blotches, which leave the segment or stain the ground, cost exponentially, and a drawing that hardly
    stands out loses in proportion; which digit or which colours are drawn plays no part. Distances are in RGB.
    """

    name = "miniature_look"
    needs: ClassVar[Needs] = Needs()

    def identity(self) -> dict[str, Any]:
        return {"engine": "miniature look, closed form"}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32; the prompts are not read."""
        pictures = _pictures(images)
        ground, ink = _ground_and_ink(pictures)
        axis = ink - ground
        length = axis.norm(dim=1).clamp_min(1e-6)
        offset = pictures.flatten(2) - ground[:, :, None]
        along = (offset * axis[:, :, None]).sum(1) / length[:, None] ** 2
        residual = offset - along.clamp(0, 1)[:, None] * axis[:, :, None]
        sides = (pictures[..., _SIDE_COLUMNS] - ground[:, :, None, None]).flatten(2)
        # The median over all side pixels keeps strokes that reach the sides from counting as stains.
        stains = sides.square().sum(1).median(1).values.sqrt()
        off = residual.square().sum(1).mean(1).sqrt() + stains
        return torch.exp(-off / 0.12) * (length / 0.35).clamp(max=1)
