"""What diffusers' pipelines make of a reference picture before they encode it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image


class CaughtError(Exception):
    """Ends a pipeline where its pictures are resized."""


def resized_by(pipeline: Any, picture: Image.Image, where: str, encoded: int) -> tuple[Any, Any]:
    """What the text encoder of `pipeline` would see of a picture, and what its method `where` is called with.

    Args:
        encoded: how many values its `encode_prompt` returns.
    """
    seen: list[Any] = []
    given: list[Any] = []

    def encode_prompt(*_: Any, image: Any = None, **__: Any) -> tuple[torch.Tensor, ...]:
        seen.append(image)
        return (torch.zeros(1, 1, 32),) * encoded

    def stop(*args: Any, **options: Any) -> None:
        given.append(args[0] if args else options["images"])
        raise CaughtError

    with (
        patch.object(pipeline, "encode_prompt", encode_prompt),
        patch.object(pipeline, where, stop),
        pytest.raises(CaughtError),
    ):
        pipeline(prompt="a", image=picture, num_inference_steps=2)
    return seen[0], given[0]
