"""mmdet 2.x's test pipeline and Mask2Former's instance post-processing, without mmdet and OpenCV.

The pipeline of `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py` (mmdet 2.28.2), which GenEval runs: resize 8-bit
pixels, keeping the ratio, to fit (1333, 800); pad right and bottom with grey 128 to multiples of 32; normalise. mmdet
3.x resizes in floating point and pads after normalising, with 0; images whose sides are no multiples of 32 then
differ along the padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

DESCRIPTION = "mmdet 2.x: cv2 bilinear on 8 bits to (1333, 800), pad 128 to 32, ImageNet mean and std"

_LONG, _SHORT = 1333, 800
_DIVISOR = 32
_PADDING = 128
_MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
_STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)
_DETECTIONS = 100

# OpenCV's fixed-point bilinear: weights of 11 bits, of which the first pass keeps 7.
_ONE = 1 << 11


@dataclass(frozen=True)
class Prepared:
    """An image as the network sees it, and the sizes (height, width) that lead back.

    Attributes:
        pixels: [3, H, W] float32, normalised RGB; H and W are multiples of 32.
        content: size of the resized image, without padding.
        original: size of the image.
    """

    pixels: Tensor
    content: tuple[int, int]
    original: tuple[int, int]


@dataclass(frozen=True)
class Instances:
    """Objects of one image, [N] each: `scores` float32, `labels` int64, `boxes` [N, 4] float32 (left, top, right,
    bottom; right and bottom are one past the last pixel) and `masks` [N, H, W] bool, in the image's own size."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned as its EXIF says: what OpenCV gives when it reads the file."""
    return ImageOps.exif_transpose(image).convert("RGB")


def prepare(image: Image.Image) -> Prepared:
    """An RGB image of any size."""
    pixels = np.asarray(image)
    original = pixels.shape[:2]
    resized = resize_linear(pixels, fitted_size(*original))
    content = resized.shape[:2]
    bottom, right = (-side % _DIVISOR for side in content)
    padded = np.pad(resized, ((0, bottom), (0, right), (0, 0)), constant_values=_PADDING)
    normalised = (padded.astype(np.float32) - _MEAN) * (1 / _STD)
    return Prepared(torch.from_numpy(normalised.transpose(2, 0, 1).copy()), content, original)


def fitted_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) scaled up or down to touch the box of 1333 (long side) x 800 (short side)."""
    scale = min(_LONG / max(height, width), _SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_linear(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`cv2.resize(..., interpolation=cv2.INTER_LINEAR)` of [H, W, C] to `size` (height, width), bit for bit.

    No anti-aliasing. Columns first, at 11 fractional bits; then rows, each product cut to an integer before the sum.
    """
    (top, bottom, row_weights), (left, right, column_weights) = (
        _taps(new, old) for new, old in zip(size, pixels.shape[:2], strict=True)
    )
    # OpenCV gives columns beyond the edge a weight of 0, rows beyond it the edge row under both weights.
    column_weights[(left < 0) | (right > pixels.shape[1] - 1)] = (_ONE, 0)
    wide = pixels.astype(np.int32)
    columns = wide[:, left.clip(0, pixels.shape[1] - 1)] * column_weights[:, 0, None]
    columns += wide[:, right.clip(0, pixels.shape[1] - 1)] * column_weights[:, 1, None]
    columns >>= 4
    rows = (columns[top.clip(0, pixels.shape[0] - 1)] * row_weights[:, 0, None, None]) >> 16
    rows += (columns[bottom.clip(0, pixels.shape[0] - 1)] * row_weights[:, 1, None, None]) >> 16
    return ((rows + 2) >> 2).clip(0, 255).astype(np.uint8)


def _taps(new: int, old: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """For each new pixel the two old ones it lies between (possibly outside) and their weights, [new, 2] of 11 bits."""
    centres = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(centres).astype(np.int64)
    fraction = centres - first.astype(np.float32)
    weights = np.stack([1 - fraction, fraction], axis=1)
    return first, first + 1, np.rint(weights * _ONE).astype(np.int32)


@torch.no_grad()
def instances(class_logits: Tensor, mask_logits: Tensor, prepared: Prepared) -> Instances:
    """mmdet's `instance_postprocess`: the 100 best (query, class) pairs of one image.

    A score is the class's softmax probability (no-object included, last) times the mean of sigmoid over the mask's
    pixels. Masks are upsampled to the network's input, cut to its content, then resized to the image; a pixel
    belongs to a mask where its logit is positive. A query may come with several classes.

    Args:
        class_logits: [Q, classes + 1].
        mask_logits: [Q, h, w], of any resolution.
        prepared: the image they belong to.
    """
    padded = _resized(mask_logits.float(), tuple(prepared.pixels.shape[1:]))
    logits = _resized(padded[:, : prepared.content[0], : prepared.content[1]], prepared.original)
    inside = logits > 0
    certainty = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(_DETECTIONS, probabilities.numel()))
    queries, labels = best.indices // probabilities.shape[1], best.indices % probabilities.shape[1]
    return Instances(best.values * certainty[queries], labels, boxes_of(inside)[queries], inside[queries])


def _resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def boxes_of(masks: Tensor) -> Tensor:
    """[N, H, W] bool to [N, 4] float32: the tight box of each mask, zeros for an empty one."""
    height, width = masks.shape[1:]

    def extent(occupied: Tensor, length: int) -> tuple[Tensor, Tensor]:
        index = torch.arange(length, device=masks.device)
        first = torch.where(occupied, index, length).amin(1)
        return first, torch.where(occupied, index + 1, 0).amax(1)

    left, right = extent(masks.any(1), width)
    top, bottom = extent(masks.any(2), height)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes * masks.flatten(1).any(1, keepdim=True)
