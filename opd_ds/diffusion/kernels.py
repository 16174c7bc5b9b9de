"""Transition kernels: one sampler step is affine in the model's velocity.

With sigma going from 1 (noise) to 0 (image), x_sigma = (1 - sigma) * x0 + sigma * noise and velocity
v = noise - x0, every sampler here has the form

    x' = a * x + b * v(x, sigma) + c * h + std * eps,          eps ~ N(0, I)

where a, b, c and std depend only on the sampler and on the pair (sigma, sigma'), and h is the sampler's
history: the image predicted at the previous step (`predicted_x0`), a constant as far as the
current velocity is concerned. Rollout, objective, policy-gradient comparison and evaluation all read this
one table, so they cannot disagree. All coefficients are float64.

Degenerate steps are decided here, once:

- sigma = 1, or almost (`PURE_NOISE`). `flow` has std ~ sqrt(sigma / (1 - sigma)), infinite there; as Flow-GRPO
  (arXiv 2505.05470) does, the next sigma stands in for sigma in that denominator. `dpm2` has log-SNR -inf at 1;
  its limits (first order on that step and on the next) are taken.
- sigma' = 0. `ddim`, `cps`: the noise vanishes by itself (std = 0). `flow` and `dance` keep theirs, as their
  authors do. `dpm2` falls back to first order.
- noise_level = 0 turns every stochastic kernel into a deterministic one (std = 0 everywhere).
- std = 0 on a step: the two Gaussians are points, their KL is not defined; `kl_weight` then compares means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.errors import UserError, nearest

# A sigma above it is pure noise: the grids of released Wan schedulers (UniPC in diffusers 0.42) start at 1 - 1e-6.
PURE_NOISE = 1 - 1e-4

CoefficientFunction = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Coefficients:
    """The table of one sampler on one schedule: `a`, `b`, `c`, `std`, each float64 of shape [T]."""

    a: Tensor
    b: Tensor
    c: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.a)

    def mean(self, step: int, x: Tensor, velocity: Tensor, history: Tensor | None) -> Tensor:
        """Mean of x' given `x` and `velocity` [B, ...]; `history` is not read where c is 0 on this step."""
        mean = float(self.a[step]) * x + float(self.b[step]) * velocity
        c = float(self.c[step])
        if c != 0.0:
            if history is None:
                raise ValueError(f"step {step} has a history coefficient of {c:g} but no history was given")
            mean = mean + c * history
        return mean

    def where(self, steps: Tensor, others: Coefficients) -> Coefficients:
        """These on the steps of the mask `steps` bool [T], those of `others` elsewhere."""
        pairs = zip((self.a, self.b, self.c, self.std), (others.a, others.b, others.c, others.std), strict=True)
        return Coefficients(*(torch.where(steps, mine, theirs) for mine, theirs in pairs))


@dataclass(frozen=True)
class TransitionKernel:
    """A named sampler at one noise level (see `kernel`)."""

    name: str
    noise_level: float
    stochastic: bool
    _function: CoefficientFunction

    def coefficients(self, sigmas: Tensor) -> Coefficients:
        """Coefficients on the grid `sigmas` [T+1], strictly decreasing from at most 1 to at least 0.

        Raises:
            ValueError: the grid is not one-dimensional, not decreasing or leaves [0, 1].
        """
        grid = sigmas.detach().to(device="cpu", dtype=torch.float64)
        if grid.ndim != 1 or len(grid) < 2:
            raise ValueError(f"sigmas must have shape [T+1] with T >= 1, got {tuple(sigmas.shape)}")
        if not bool((grid[:-1] > grid[1:]).all()) or float(grid[-1]) < 0 or float(grid[0]) > 1:
            raise ValueError(f"sigmas must decrease strictly within [0, 1], from noise to image; got {grid.tolist()}")
        return Coefficients(*self._function(grid[:-1], grid[1:], self.noise_level))


def predicted_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """x0 = x - sigma * v: what a multistep sampler remembers of a step."""
    return x - sigma * velocity


def _euler(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probability-flow ODE, explicit Euler: x' = x + (sigma' - sigma) v. First-order DPM-Solver++ is the same map."""
    zero = torch.zeros_like(sigma)
    return torch.ones_like(sigma), sigma_next - sigma, zero, zero


def _langevin(sigma: Tensor, dt: Tensor, diffusion: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Euler-Maruyama of the SDE with the same marginals and diffusion coefficient `diffusion` (DiffusionOPD 3.1)."""
    half = diffusion**2 / (2 * sigma)
    return 1 + half * dt, (1 + half * (1 - sigma)) * dt, torch.zeros_like(sigma), diffusion * torch.sqrt(-dt)


def _flow(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flow-GRPO SDE (arXiv 2505.05470): diffusion noise_level * sqrt(sigma / (1 - sigma))."""
    remaining = 1 - torch.where(sigma > PURE_NOISE, sigma_next, sigma)
    return _langevin(sigma, sigma_next - sigma, noise_level * torch.sqrt(sigma / remaining))


def _dance(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DanceGRPO SDE (arXiv 2505.07818): constant diffusion noise_level."""
    return _langevin(sigma, sigma_next - sigma, torch.full_like(sigma, noise_level))


def _from_prediction(
    sigma: Tensor, on_picture: Tensor, on_noise: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' = on_picture * x0 + on_noise * noise + std * eps, with x0 = x - sigma v and noise = x + (1 - sigma) v."""
    return on_picture + on_noise, (1 - sigma) * on_noise - sigma * on_picture, torch.zeros_like(sigma), std


def _ddim(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DDIM (arXiv 2010.02502) with alpha = 1 - sigma; noise_level is its eta, so 1 is ancestral sampling."""
    kept = ((1 - sigma) / (1 - sigma_next)) ** 2 * sigma_next**2
    std = noise_level * sigma_next / sigma * torch.sqrt((sigma**2 - kept).clamp_min(0))
    return _from_prediction(sigma, 1 - sigma_next, torch.sqrt((sigma_next**2 - std**2).clamp_min(0)), std)


def _cps(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flow-CPS (arXiv 2509.05952): predicted and fresh noise share the level sigma' as cos and sin of an angle."""
    angle = noise_level * math.pi / 2
    return _from_prediction(sigma, 1 - sigma_next, sigma_next * math.cos(angle), sigma_next * math.sin(angle))


def _dpm2(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095), history = previous predicted image.

    The first step and a last step that ends at sigma' = 0 are first order. The step after sigma = 1 is first
    order in the limit: the previous interval in log-SNR is infinite.
    """
    snr = torch.log((1 - sigma) / sigma)  # log-SNR/2, -inf at sigma = 1
    snr_next = torch.log((1 - sigma_next) / sigma_next)  # +inf at sigma' = 0
    length = snr_next - snr
    gain = (1 - sigma_next) * -torch.expm1(-length)
    extrapolation = torch.zeros_like(sigma)
    extrapolation[1:] = 0.5 * length[1:] / length[:-1]
    extrapolation = torch.where(sigma_next == 0, torch.zeros_like(sigma), extrapolation)
    on_current = gain * (1 + extrapolation)
    return (
        sigma_next / sigma + on_current,
        -sigma * on_current,
        -gain * extrapolation,
        torch.zeros_like(sigma),
    )


# A new sampler is one function above and one line here: (function, whether noise_level means anything to it).
_KERNELS: dict[str, tuple[CoefficientFunction, bool]] = {
    "euler": (_euler, False),
    "flow": (_flow, True),
    "dance": (_dance, True),
    "ddim": (_ddim, True),
    "dpm1": (_euler, False),
    "dpm2": (_dpm2, False),
    "cps": (_cps, True),
}


def kernel_names(*, stochastic: bool | None = None) -> list[str]:
    """All kernels, or only those that can (True) or cannot (False) add noise."""
    return [name for name, (_, noisy) in _KERNELS.items() if stochastic is None or noisy is stochastic]


def kernel(name: str, noise_level: float = 0.0) -> TransitionKernel:
    """The transition kernel `name` at `noise_level`.

    `noise_level` scales the noise of `flow`, `dance`, `ddim` (eta, at most 1) and `cps` (at most 1). `euler`, `dpm1`
    and `dpm2` are deterministic: they have std = 0 whatever the level (a run config that asks them for noise is
    refused, see `opd_ds.config.schema`).

    Raises:
        UserError: unknown name, or a level that the sampler does not define.
    """
    if name not in _KERNELS:
        raise UserError(f"kernel {name!r} is not known; allowed: {', '.join(_KERNELS)}.{nearest(name, _KERNELS)}")
    function, stochastic = _KERNELS[name]
    limit = 1.0 if name in ("ddim", "cps") else math.inf
    if not 0.0 <= noise_level <= limit:
        raise UserError(f"noise_level {noise_level} is not possible for kernel {name!r}; allowed: 0 to {limit:g}")
    return TransitionKernel(name, noise_level, stochastic and noise_level > 0, function)
