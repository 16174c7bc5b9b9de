"""What tiny pipelines have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# What the tokenizers are trained on.
TEXTS = ["a red 3 on blue", "a green 7 on white", "a blue 0 on red", "the number 5", "a neat 8 beside a black square"]


def save(pipeline: Any, folder: Path) -> Path:
    """Write `pipeline` with a random transformer; layers that start at zero would hide what is in front of them."""
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    pipeline.save_pretrained(folder)
    return folder
