"""Small images for the rewards' tests."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont


def drawn(text: str, size: int = 256) -> Image.Image:
    """Black on white, one line below the other."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).multiline_text((16, size // 3), text, "black", ImageFont.load_default(size=size // 8))
    return image


def flat(colour: str, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), colour)
