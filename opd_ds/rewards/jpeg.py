"""JPEG size as a reward, as in DDPO (Black et al., arXiv 2305.13301): needs no weights, knows nothing of the prompt."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from opd_ds.rewards.base import Metadata, Needs

_QUALITY = 95


def jpeg_kilobytes(image: Image.Image) -> float:
    """Size in kB (1000 bytes) of the image as RGB JPEG at quality 95."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.tell() / 1000


class JpegIncompressibility:
    """How much there is in an image: its JPEG size in kB (1000 bytes), quality 95. Range (0, inf).

    It grows with the number of pixels: compare images of one size only. Flow-GRPO uses the same unit here, and
    divides the negative by 500 for compressibility; DDPO and we do not.
    """

    name = "jpeg_incompressibility"
    needs: ClassVar[Needs] = Needs()
    _sign: ClassVar[float] = 1.0

    def identity(self) -> dict[str, Any]:
        # The encoder decides the number of bytes.
        from PIL import __version__, features

        return {"engine": f"Pillow {__version__}", "encoder": features.version("jpg"), "quality": _QUALITY}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32; the prompts are not read."""
        return torch.tensor([self._sign * jpeg_kilobytes(image) for image in images], dtype=torch.float32)


class JpegCompressibility(JpegIncompressibility):
    """How little there is in an image: minus its JPEG size in kB (1000 bytes), quality 95. Range (-inf, 0)."""

    name = "jpeg_compressibility"
    _sign: ClassVar[float] = -1.0
