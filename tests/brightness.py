"""A reward that is almost linear in the pixels, for runs that learn from one."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from PIL import Image, ImageStat


def brightness(images: list[Image.Image], prompts: list[str], metadata: Any = None) -> list[float]:
    """From 0 to 255."""
    return [fmean(ImageStat.Stat(image).mean) for image in images]
