"""ClipScore: does the image match its prompt, as CLIP sees it?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError, nearest
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.clip import FOLDER_PREPROCESSING, FolderCLIPReward
from opd_ds.rewards.pictures import Preprocess, centre_crop, centre_crop_bilinear, close_scores
from opd_ds.rewards.weights import Weights

CLIP_VIT_L_14 = Weights("clip-vit-large-patch14", "openai/clip-vit-large-patch14", None, "1.7 GB")

_RESIZES: Mapping[str, tuple[str, Preprocess]] = {
    "bicubic": (FOLDER_PREPROCESSING, centre_crop),
    "bilinear": ("short side bilinear (torch, antialiased), centre crop", centre_crop_bilinear),
}


class ClipScore(FolderCLIPReward):
    """Cosine between image and prompt in OpenAI's CLIP ViT-L/14. Range [-1, 1], typically 0.2 to 0.35.

    The plain cosine, which evaluation tables print. CLIPScore as first published (arXiv 2104.08718) is
    2.5 max(cosine, 0) on ViT-B/32; DiffusionNFT divides the logit by 100, which is the cosine again, Flow-GRPO by 30.

    Args:
        device, batch_size, dtype, weights: as `FolderCLIPReward`.
        resize: bicubic, CLIP's own preprocessing; bilinear, what torchvision does by default, and with it the scorers
            of Flow-GRPO, DiffusionNFT and DiffusionOPD, which the published tables are from.
    """

    name = "clipscore"
    needs = Needs(weights=(CLIP_VIT_L_14,))

    def __init__(
        self,
        device: str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        weights: str | Path | None = None,
        resize: str = "bicubic",
    ) -> None:
        self._resize = resize
        super().__init__(device, batch_size, dtype, weights)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        resize = options.get("resize", "bicubic")
        if resize not in _RESIZES:
            raise UserError(
                f"reward 'clipscore': resize = {resize!r}; allowed: {', '.join(_RESIZES)}."
                f"{nearest(str(resize), _RESIZES)}"
            )
        return super().needs_for(options)

    def _preprocessing(self) -> tuple[str, Preprocess]:
        return _RESIZES[self._resize]

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        return close_scores(self._gaps, self._clip.cosine(images, prompts))
