"""opd_ds: on-policy distillation of several diffusion teachers into one student, under DeepSpeed."""

__version__ = "0.1.0"
