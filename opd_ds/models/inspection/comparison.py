"""Whether two diffusers folders have the same networks beside the transformer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from opd_ds.models.inspection.inspector import inspect
from opd_ds.models.inspection.parts import Part
from opd_ds.models.two_networks import PARTS


def differing_parts(theirs: Path, ours: Path) -> list[str]:
    """Text encoders and VAE, by name, that are in both folders with other weights. Of each tensor the first row is read
    and held against the other, as exactly as the coarser of the two types allows.
    """
    first, second = _beside_the_transformer(theirs), _beside_the_transformer(ours)
    return [name for name in first if name in second and _differ(first[name], second[name])]


def _beside_the_transformer(folder: Path) -> dict[str, Part]:
    return {part.name: part for part in inspect(folder).parts if part.name not in PARTS and part.problem is None}


def _differ(part: Part, other: Part) -> bool:
    if [file.resolve() for file in part.files] == [file.resolve() for file in other.files]:
        return False
    first, second = _first_rows(part.files), _first_rows(other.files)
    return any(not _close(first[key], second[key]) for key in first.keys() & second.keys())


def _first_rows(files: Iterable[Path]) -> dict[str, Tensor]:
    found = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 (no mapping)
                    part = stored.get_slice(key)
                    found[key] = part[:1] if part.get_shape() else stored.get_tensor(key)
    return found


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    types = {first.dtype, second.dtype}
    rounding = max(torch.finfo(dtype).eps for dtype in types if dtype.is_floating_point) if len(types) == 2 else 0.0
    return torch.allclose(first.float(), second.float(), rtol=rounding, atol=rounding * 1e-3)
