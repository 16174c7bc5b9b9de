"""opd_ds: on-policy distillation of several diffusion teachers into one student, under DeepSpeed."""

from opd_ds.utils.torchvision_guard import hide_broken_torchvision

__version__ = "0.1.0"

# Before any module here imports transformers or diffusers. None, or why torchvision is treated as absent.
TORCHVISION_PROBLEM = hide_broken_torchvision()
