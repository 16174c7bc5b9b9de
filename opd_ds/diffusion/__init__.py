"""Schedules, transition kernels and objectives: pure torch, no model, no DeepSpeed."""

from opd_ds.diffusion.kernels import Coefficients, TransitionKernel, kernel, kernel_names
from opd_ds.diffusion.objective import (
    gaussian_kl,
    kl_weight,
    mean_matching,
    ppo_style_loss,
    step_weights,
    velocity_error,
)

__all__ = [
    "Coefficients",
    "TransitionKernel",
    "gaussian_kl",
    "kernel",
    "kernel_names",
    "kl_weight",
    "mean_matching",
    "ppo_style_loss",
    "step_weights",
    "velocity_error",
]
