"""Lets the reference libraries import torchvision where its compiled operators do not load.

torchvision's wheels are linked against CUDA builds of one exact torch; next to a CPU build its import ends in "operator
torchvision::nms does not exist". Declaring the operators is enough for importing it and for its transforms.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

_kept: list[Any] = []  # a torch library lives as long as its object


def ensure_torchvision() -> None:
    """Make `import torchvision` work if it is installed. Its compiled operators still raise when they are called."""
    if _kept or find_spec("torchvision") is None:
        return
    try:
        import torchvision  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        import torch

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
