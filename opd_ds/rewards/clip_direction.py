"""ClipDirection: does an edit change the picture as it changes the caption?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opd_ds.rewards.base import Metadata, Needs, Takes
from opd_ds.rewards.clip import FolderCLIPReward
from opd_ds.rewards.clipscore import CLIP_VIT_L_14
from opd_ds.rewards.gaps import scored_where
from opd_ds.rewards.references import WITHOUT, Own, References

SOURCE, TARGET = "source_caption", "target_caption"


class ClipDirection(FolderCLIPReward):
    """Cosine of an edit's direction among CLIP's images with that among its texts. Range [-1, 1], higher is better.

    With unit embeddings I of images and T of texts, the cosine of I(edited) - I(reference) and T(target) - T(source):
    the directional similarity of StyleGAN-NADA (arXiv 2108.00946), by which InstructPix2Pix (arXiv 2211.09800)
    evaluates, on ViT-L/14 as there. An image equal to its reference has 0. One without a reference, without one of the
    captions, or with two equal captions has no score.

    Args:
        device, batch_size, dtype, weights: as `FolderCLIPReward`.
        source: the column with a caption of the reference picture.
        target: the column with a caption of the edited picture; `prompt` is the prompt itself.
    """

    name = "clip_direction"
    needs = Needs(weights=(CLIP_VIT_L_14,))
    takes_references: ClassVar[bool] = True

    def __init__(
        self,
        device: str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        weights: str | Path | None = None,
        source: str = SOURCE,
        target: str = TARGET,
    ) -> None:
        self._source, self._target = source, target
        super().__init__(device, batch_size, dtype, weights)

    @classmethod
    def takes_for(cls, options: Mapping[str, Any]) -> Takes:
        wanted = options.get("source", SOURCE), options.get("target", TARGET)
        return Takes(references=True, columns=tuple(column for column in wanted if column != "prompt"))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"source": self._source, "target": self._target}

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32."""
        given = metadata or [{}] * len(images)
        rows = [{**row, "prompt": prompt} for row, prompt in zip(given, prompts, strict=True)]
        beside = references or [()] * len(images)
        reasons = [self._lacks(row, own) for row, own in zip(rows, beside, strict=True)]

        def score(places: list[int]) -> Tensor:
            edited = self._clip.images([images[place] for place in places])
            before = self._clip.images([beside[place][0] for place in places])
            source, target = (
                self._clip.prompts([rows[place][column] for place in places]) for column in (self._source, self._target)
            )
            return F.cosine_similarity(edited - before, target - source, dim=-1)

        return self._gaps.close(scored_where(reasons, score))

    def _lacks(self, row: Mapping[str, Any], references: Own) -> str | None:
        for column in (self._source, self._target):
            if not isinstance(row.get(column), str):
                return f"prompt without {column!r}"
        if row[self._source] == row[self._target]:
            return f"prompt with equal {self._source!r} and {self._target!r}"
        return None if references else WITHOUT
