"""Model families, by name. A new family is one file with a class and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from opd_ds.errors import UserError, nearest
from opd_ds.models.base import Conditioning, ModelFamily, guided_velocity


def _sd3(path: Path, **settings: object) -> ModelFamily:
    from opd_ds.models.sd3 import SD3

    return SD3(path, **settings)  # type: ignore[arg-type]


FAMILIES: dict[str, Callable[..., ModelFamily]] = {"sd3": _sd3}


def build_family(name: str, path: Path, *, dtype: torch.dtype, device: torch.device, **settings: object) -> ModelFamily:
    """The family `name` around the diffusers folder `path`.

    Raises:
        UserError: unknown family, or a folder that is not of this family.
    """
    if name not in FAMILIES:
        raise UserError(f"model.family = {name!r}: unknown; allowed: {', '.join(FAMILIES)}.{nearest(name, FAMILIES)}")
    return FAMILIES[name](path, dtype=dtype, device=device, **settings)


__all__ = ["FAMILIES", "Conditioning", "ModelFamily", "build_family", "guided_velocity"]
