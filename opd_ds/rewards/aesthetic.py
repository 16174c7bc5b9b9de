"""LAION's aesthetic predictor: how pleasing is the image?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.checkpoints import linear_head, located, precision, read_state, still_needed
from opd_ds.rewards.clip import DTYPES, FOLDER_PREPROCESSING, clip_from_folder
from opd_ds.rewards.clipscore import CLIP_VIT_L_14
from opd_ds.rewards.gaps import CountsGaps, Gaps
from opd_ds.rewards.pictures import close_scores
from opd_ds.rewards.weights import Weights
from opd_ds.utils.hashing import file_sha256

_HEAD = Weights(
    "aesthetic",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.pth",
    "3.7 MB",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


class Aesthetic(CountsGaps):
    """People's rating of an image, from 1 to 10, learnt on SAC, logos and AVA; generated images get about 5 to 7.

    Five linear layers on the unit embedding of OpenAI's CLIP ViT-L/14
    (github.com/christophschuhmann/improved-aesthetic-predictor). The prompt is not read; nothing bounds the number.

    Args:
        device: where CLIP runs.
        batch_size: images per forward.
        dtype: float32, bfloat16 or float16, of CLIP; the head is float32.
        weights: a file in the layout of the published head instead of it.
        clip: a folder in transformers' layout instead of the published CLIP.

    Raises:
        WeightsMissingError, WrongWeightsError: no such file; not such a head; CLIP of another width.
    """

    name = "aesthetic"
    needs: ClassVar[Needs] = Needs(weights=(_HEAD, CLIP_VIT_L_14))

    def __init__(
        self,
        device: str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        weights: str | Path | None = None,
        clip: str | Path | None = None,
    ) -> None:
        kind = precision(self.name, dtype, *DTYPES)
        self._file, self._folder = located(_HEAD, weights), located(CLIP_VIT_L_14, clip)
        self._clip = clip_from_folder(self._folder, device=device, dtype=kind, batch_size=batch_size)
        self._head = linear_head(read_state(self._file), self._clip.width, str(self._file))
        self._dtype, self._gaps = dtype, Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        precision(cls.name, options.get("dtype", DTYPES[0]), *DTYPES)
        return still_needed(cls.needs, options, "weights", "clip")

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "transformers CLIPModel, LAION's linear head",
            "dtype": self._dtype,
            "sha256": file_sha256(self._file),
            "clip_sha256": file_sha256(self._folder),
            "preprocessing": FOLDER_PREPROCESSING,
        }

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32; the prompts are not read."""
        return close_scores(self._gaps, self._head(self._clip.images(images))[:, 0])
