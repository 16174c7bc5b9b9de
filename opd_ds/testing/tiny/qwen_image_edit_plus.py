"""A tiny random Qwen-Image-Edit-2509."""

from __future__ import annotations

from pathlib import Path

from diffusers import QwenImageEditPlusPipeline

from opd_ds.testing.tiny import qwen_image_edit
from opd_ds.testing.tiny.qwen_image_edit import draw

__all__ = ["SETTINGS", "draw", "write"]

SETTINGS = {"reference_side": 48}


def write(folder: Path, seed: int = 0) -> Path:
    return qwen_image_edit.write(folder, seed, QwenImageEditPlusPipeline)
