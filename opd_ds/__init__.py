"""opd_ds: on-policy distillation of several diffusion teachers into one student, under DeepSpeed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from opd_ds.utils.torchvision_guard import hide_broken_torchvision

__version__ = "0.1.0"

# Before any module here imports transformers or diffusers. None, or why torchvision is treated as absent.
TORCHVISION_PROBLEM = hide_broken_torchvision()

# Loaded when they are asked for: `import opd_ds` loads neither torch nor diffusers.
_API = (
    "load_config",
    "train",
    "teach",
    "evaluate",
    "export_checkpoint",
    "merge_weights",
    "plan_run",
    "load_family",
    "find",
)
_DIFFUSION = ("Coefficients", "gaussian_kl", "kernel", "kernel_names", "kl_weight", "step_weights", "velocity_error")
_PLACES = {
    **dict.fromkeys(_API, "opd_ds.api"),
    "Choice": "opd_ds.runs.evaluate",
    "Requests": "opd_ds.runs.model_specs",
    "Method": "opd_ds.merge.merging",
    **dict.fromkeys(_DIFFUSION, "opd_ds.diffusion"),
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'opd_ds' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
