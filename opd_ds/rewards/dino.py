"""Dino: is an edited picture still of the same thing?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opd_ds.rewards.base import Metadata, Needs, batches
from opd_ds.rewards.checkpoints import from_transformers, located, precision, still_needed
from opd_ds.rewards.gaps import CountsGaps, Gaps, scored_where
from opd_ds.rewards.pictures import centre_crop_imagenet, stacked
from opd_ds.rewards.references import WITHOUT, References
from opd_ds.rewards.weights import Weights
from opd_ds.utils.hashing import file_sha256

_DTYPES = ("float32", "bfloat16")
_SIDE = 224


class Dino(CountsGaps):
    """Cosine between an edited picture and its reference in DINOv2 ViT-B/14. Range [-1, 1]; 1 is unchanged.

    Of the class tokens after the last norm, as DreamBooth (arXiv 2208.12242) compares subjects by DINO. What the edit
    is meant to change counts as what it is meant to keep, so learn from it beside a reward of the edit. An image
    without a reference has no score.

    Args:
        device: where the network runs.
        batch_size: images per forward.
        dtype: float32 or bfloat16, of the network.
        weights: a folder of a DINOv2 in transformers' layout instead of the published one.

    Raises:
        WeightsMissingError, WrongWeightsError: no such folder; not a complete DINOv2.
    """

    name = "dino"
    takes_references: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        weights=(
            Weights(
                "dinov2-base", "facebook/dinov2-base", None, "346 MB", contents="config.json and model.safetensors"
            ),
        )
    )

    def __init__(
        self, device: str = "cpu", batch_size: int = 16, dtype: str = "float32", weights: str | Path | None = None
    ) -> None:
        from transformers import Dinov2Model

        kind = precision(self.name, dtype, *_DTYPES)
        self._folder = located(self.needs.weights[0], weights)
        model = from_transformers(Dinov2Model, self._folder, str(self._folder))
        self._model = model.to(device=device, dtype=kind).eval().requires_grad_(False)
        self._device, self._kind, self._batch_size, self._dtype = device, kind, batch_size, dtype
        self._gaps = Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        precision(cls.name, options.get("dtype", _DTYPES[0]), *_DTYPES)
        return still_needed(cls.needs, options, "weights")

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "transformers Dinov2Model",
            "dtype": self._dtype,
            "sha256": file_sha256(self._folder),
            "preprocessing": "short side to 256 bicubic (Pillow), centre crop 224",
        }

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32; the prompts are not read."""
        beside = references or [()] * len(images)

        def score(places: list[int]) -> Tensor:
            edited = self._embedded([images[place] for place in places])
            return (edited * self._embedded([beside[place][0] for place in places])).sum(-1)

        return self._gaps.close(scored_where([None if own else WITHOUT for own in beside], score))

    @torch.no_grad()
    def _embedded(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit class tokens, float32 [B, D] on the CPU; NaN where an image cannot be read."""
        found = [
            self._model(pixel_values=stacked(part, centre_crop_imagenet, _SIDE).to(self._device, self._kind))
            for part in batches(images, self._batch_size)
        ]
        return F.normalize(torch.cat([one.last_hidden_state[:, 0].float().cpu() for one in found]), dim=-1)
