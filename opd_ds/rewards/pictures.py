"""From an image to what CLIP, BLIP and DINO see, on Pillow and torch: the same on every machine, torchvision or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opd_ds.rewards.gaps import UNREADABLE, Gaps

# Of OpenAI's training images, which CLIP and BLIP keep, and of ImageNet.
_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
_IMAGENET_MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
_IMAGENET_STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]

Preprocess = Callable[[Image.Image, int], Tensor]


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """The short side to `size`, bicubic on 8 bits, then the middle square: [3, size, size] float32, normalised.

    Equal to transformers' CLIP image processor on Pillow; of an odd margin the smaller half is left and above.
    """
    return _normalised(_unit(_cropped(image, size, size, lambda margin: margin // 2)))


def centre_crop_imagenet(image: Image.Image, size: int) -> Tensor:
    """The short side to 8 / 7 of `size` (224: 256), bicubic on 8 bits, then the middle square: [3, size, size] float32,
    normalised. Equal to transformers' image processor of DINOv2 on Pillow.
    """
    unit = _unit(_cropped(image, round(size * 8 / 7), size, lambda margin: margin // 2))
    return (unit - _IMAGENET_MEAN) / _IMAGENET_STD


def centre_crop_torchvision(image: Image.Image, size: int) -> Tensor:
    """`centre_crop` as torchvision does it: half a margin is rounded to the even number of pixels, not down."""
    return _normalised(_unit(_cropped(image, size, size, lambda margin: round(margin / 2))))


def _cropped(image: Image.Image, short: int, size: int, half: Callable[[int], int]) -> Image.Image:
    rgb = image.convert("RGB")
    width, height = _short_side_to(rgb.size, short)
    left, top = half(width - size), half(height - size)
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def centre_crop_bilinear(image: Image.Image, size: int) -> Tensor:
    """The short side to `size`, bilinear with antialiasing on floats, then the middle square: [3, size, size] float32,
    normalised. Equal to torchvision's `Resize(size)` and `CenterCrop(size)`, at their defaults, of a float tensor.
    """
    unit = _unit(image.convert("RGB"))
    height, width = _short_side_to(unit.shape[1:], size)
    if unit.shape[1:] != (height, width):
        unit = F.interpolate(unit[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _normalised(unit[:, top : top + size, left : left + size])


def _short_side_to(sides: Sequence[int], size: int) -> tuple[int, int]:
    """Both sides, in the order given."""
    short = min(sides)
    first, second = (size if side == short else int(size * side / short) for side in sides)
    return first, second


def pad_long_side(image: Image.Image, size: int) -> Tensor:
    """The long side to `size`, bicubic with antialiasing on floats, black margins: [3, size, size], normalised.

    HPSv2's own preprocessing (`ResizeMaxSize` in hpsv2x 1.2.0): the whole image is scored, also a wide one, and
    values may leave [0, 1] at edges.
    """
    unit = _unit(image.convert("RGB"))
    long = max(unit.shape[1:])
    height, width = (max(1, round(side * (size / long))) for side in unit.shape[1:])
    if long != size:
        unit = F.interpolate(unit[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return _normalised(F.pad(unit, (left, size - width - left, top, size - height - top)))


def stacked(images: Sequence[Image.Image], preprocess: Preprocess, size: int) -> Tensor:
    """[B, 3, size, size]. An image that cannot be read is NaN, which no network turns into a number, and is logged."""
    pixels = torch.full((len(images), 3, size, size), torch.nan)
    for row, image in enumerate(images):
        try:
            pixels[row] = preprocess(image, size)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, for truncated and damaged files
            logging.getLogger("opd_ds").warning("an image cannot be read: %s: %s", type(error).__name__, error)
    return pixels


def close_scores(gaps: Gaps, scores: Tensor) -> Tensor:
    """[B] float32, what is not finite counted in `gaps` and NaN."""
    return gaps.close([score if isfinite(score) else UNREADABLE for score in scores.tolist()])


def _unit(rgb: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255


def _normalised(unit: Tensor) -> Tensor:
    return (unit - _MEAN) / _STD
