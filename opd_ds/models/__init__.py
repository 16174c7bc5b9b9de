"""Model families, by name. A new family is one file with a class, and one line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from opd_ds.errors import UserError, nearest
from opd_ds.models.base import ModelFamily
from opd_ds.models.compilation import CompilationLog, block_names, compile_blocks
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.guidance import GuidedVelocity, guide, join
from opd_ds.models.prompt_encoding import ENCODED_AT_ONCE, REFERENCE
from opd_ds.models.stored_weights import ParameterBuilder, ParametersElsewhere, StoredTensor, WholeParameters

# name: (module, class). Imported when named: diffusers' classes are heavy.
FAMILIES: dict[str, tuple[str, str]] = {
    "sd3": ("sd3", "SD3"),
    "flux": ("flux", "Flux"),
    "flux_kontext": ("flux", "FluxKontext"),
    "flux2": ("flux2", "Flux2"),
    "flux2_dev": ("flux2", "Flux2Dev"),
    "qwen_image": ("qwen_image", "QwenImage"),
    "qwen_image_edit": ("qwen_image", "QwenImageEdit"),
    "qwen_image_edit_plus": ("qwen_image", "QwenImageEditPlus"),
    "z_image": ("z_image", "ZImage"),
    "wan": ("wan", "Wan"),
    "wan_a14b": ("wan_a14b", "WanA14B"),
    "wan_i2v": ("wan_i2v", "WanI2V"),
    "ltx": ("ltx", "LTX"),
}


def family_class(name: str) -> type[ModelFamily]:
    """The class of the family `name`.

    Raises:
        UserError: unknown family.
    """
    if name not in FAMILIES:
        raise UserError(f"model.family = {name!r}: unknown; allowed: {', '.join(FAMILIES)}.{nearest(name, FAMILIES)}")
    module, attribute = FAMILIES[name]
    return getattr(import_module(f"opd_ds.models.{module}"), attribute)


def build_family(name: str, path: Path, *, dtype: torch.dtype, device: torch.device, **settings: object) -> ModelFamily:
    """The family `name` around the diffusers folder `path`.

    Raises:
        UserError: unknown family, or a folder that is not of this family.
    """
    return family_class(name)(path, dtype=dtype, device=device, **settings)  # type: ignore[arg-type]


__all__ = [
    "ENCODED_AT_ONCE",
    "FAMILIES",
    "REFERENCE",
    "CompilationLog",
    "Conditioning",
    "GuidedVelocity",
    "ModelFamily",
    "ParameterBuilder",
    "ParametersElsewhere",
    "StoredTensor",
    "WholeParameters",
    "block_names",
    "build_family",
    "compile_blocks",
    "family_class",
    "guide",
    "join",
]
