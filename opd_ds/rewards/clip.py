"""CLIP's embeddings for the rewards built on them, and what the rewards on a published CLIP folder share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opd_ds.rewards.base import Needs, batches
from opd_ds.rewards.checkpoints import from_transformers, located, precision, still_needed
from opd_ds.rewards.gaps import CountsGaps, Gaps
from opd_ds.rewards.pictures import Preprocess, centre_crop, stacked
from opd_ds.rewards.tokens import Tokens
from opd_ds.rewards.weights import WrongWeightsError
from opd_ds.utils.hashing import file_sha256

if TYPE_CHECKING:
    from transformers import CLIPModel

FOLDER_PREPROCESSING = "short side bicubic (Pillow), centre crop"
# CLIP was trained and is published in half precision; norms and products of embeddings are float32 here.
DTYPES = ("float32", "bfloat16", "float16")


class CLIPEncoder:
    """Unit embeddings of images and prompts, float32 on the CPU.

    Attributes:
        logit_scale: what CLIP multiplies a cosine by.
        width: D, of an embedding.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokens: Tokens,
        preprocess: Preprocess,
        *,
        device: str,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self.logit_scale = float(model.logit_scale.detach().exp())  # bfloat16 would round 100 to 98.9
        self.width: int = model.config.projection_dim
        self._model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._tokens, self._preprocess = tokens, preprocess
        self._device, self._dtype, self._batch_size = device, dtype, batch_size

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The network's input, [B, 3, H, W] float32."""
        return stacked(images, self._preprocess, self._model.config.vision_config.image_size)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, [B, 77]."""
        return self._tokens(prompts)[0]

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """[B, D]; NaN where an image cannot be read."""
        return self._embedded(
            self._model.get_image_features(pixel_values=self.pixels(part).to(self._device, self._dtype))
            for part in batches(images, self._batch_size)
        )

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """[B, D]."""
        # No padding mask: attention is causal, so nothing after the end token reaches the embedding.
        return self._embedded(
            self._model.get_text_features(input_ids=self.tokens(part).to(self._device))
            for part in batches(prompts, self._batch_size)
        )

    def _embedded(self, parts: Iterable[Any]) -> Tensor:
        # transformers 5 returns an object, 4 a tensor.
        found = [getattr(part, "pooler_output", part).float().cpu() for part in parts]
        return F.normalize(torch.cat([torch.empty(0, self.width), *found]), dim=-1)

    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """[B], between each image and its prompt."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        return (self.images(images) * self.prompts(prompts)).sum(-1)


def clip_from_folder(
    folder: Path, *, device: str, dtype: torch.dtype, batch_size: int, preprocess: Preprocess = centre_crop
) -> CLIPEncoder:
    """CLIP from a folder in transformers' layout (config.json, model.safetensors, tokenizer.json).

    Raises:
        WrongWeightsError: the folder does not hold a complete CLIP.
    """
    from transformers import CLIPModel

    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise WrongWeightsError(f"{folder}: there is no tokenizer.json, which belongs to the published repository")
    model = from_transformers(CLIPModel, folder, str(folder))
    tokens = Tokens.from_file(tokenizer, model.config.text_config.max_position_embeddings)
    return CLIPEncoder(model, tokens, preprocess, device=device, dtype=dtype, batch_size=batch_size)


class FolderCLIPReward(CountsGaps):
    """What rewards on a published CLIP folder share.

    Args:
        device: where the network runs.
        batch_size: images per forward.
        dtype: float32, bfloat16 or float16, of the network.
        weights: a folder in transformers' layout instead of the published one.

    Raises:
        WeightsMissingError, WrongWeightsError: no such folder; not a complete CLIP.
    """

    name: str
    needs: ClassVar[Needs]

    def __init__(
        self, device: str = "cpu", batch_size: int = 16, dtype: str = "float32", weights: str | Path | None = None
    ) -> None:
        kind = precision(self.name, dtype, *DTYPES)
        self._folder = located(self.needs.weights[0], weights)
        self._clip = clip_from_folder(
            self._folder, device=device, dtype=kind, batch_size=batch_size, preprocess=self._preprocessing()[1]
        )
        self._dtype, self._gaps = dtype, Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        precision(cls.name, options.get("dtype", DTYPES[0]), *DTYPES)
        return still_needed(cls.needs, options, "weights")

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "transformers CLIPModel",
            "dtype": self._dtype,
            "sha256": file_sha256(self._folder),
            "preprocessing": self._preprocessing()[0],
        }

    def _preprocessing(self) -> tuple[str, Preprocess]:
        """What `identity` calls it, and the function."""
        return FOLDER_PREPROCESSING, centre_crop
