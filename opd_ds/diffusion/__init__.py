"""Schedules, transition kernels and objectives: pure torch, no model, no DeepSpeed."""

from opd_ds.diffusion.kernels import (
    Coefficients,
    TransitionKernel,
    kernel,
    kernel_names,
    predicted_x0,
)
from opd_ds.diffusion.objective import (
    clipped_surrogate,
    gaussian_kl,
    kl_weight,
    log_ratio,
    mean_matching,
    ppo_style_loss,
    step_weights,
    velocity_error,
)

__all__ = [
    "Coefficients",
    "TransitionKernel",
    "clipped_surrogate",
    "gaussian_kl",
    "kernel",
    "kernel_names",
    "kl_weight",
    "log_ratio",
    "mean_matching",
    "ppo_style_loss",
    "predicted_x0",
    "step_weights",
    "velocity_error",
]
