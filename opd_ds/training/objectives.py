"""Losses of distillation: the student's velocities against those of its teacher, or beyond, and of an anchor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.objectives import PaperObjective
from opd_ds.diffusion import Coefficients, kl_weight, ppo_style_loss, step_weights, velocity_error


@dataclass(frozen=True)
class TeacherVelocities:
    """Velocities [b, C, ...] at a micro-batch of pairs: the teacher's, the anchor's where there is one, and the base's
    where targets are extrapolated from it.
    """

    teacher: Tensor
    anchor: Tensor | None = None
    base: Tensor | None = None


@dataclass(frozen=True)
class DrawnTransitions(TeacherVelocities):
    """The same with what the transitions were drawn with: the behaviour policy's velocity and the noise."""

    velocity: Tensor | None = None
    noise: Tensor | None = None


class ClosedFormLoss:
    """The weighted squared velocity error to the teacher (paper, Eq. 11 and 12), plus `anchor.weight` times the same to
    the anchor. A `Loss`.

    With `objective.extrapolation` lambda the target is v_T + lambda (v_T - v_base), computed in float32: the mean of
    the optimum of ExOPD (arXiv 2602.12125), base (teacher / base)^(1 + lambda), of Gaussians with one variance.

    Measured as `kl`: the exact KL to the teacher (without noise: mean matching), whatever is minimised. With an
    extrapolated target that does not fall to 0, and `target_kl` is the same to the target.
    """

    measure = "kl"

    def __init__(self, config: DistilConfig, coefficients: Coefficients, sigmas: Tensor, device: torch.device) -> None:
        self._anchor_weight = config.anchor.weight if config.anchor else 0.0
        self._extrapolation = config.objective.extrapolation
        tables = (self._step_weights(config, coefficients, sigmas), kl_weight(coefficients))
        self._weights, self._kl = (table.to(device, torch.float32) for table in tables)

    @staticmethod
    def _step_weights(config: DistilConfig, coefficients: Coefficients, sigmas: Tensor) -> Tensor:
        objective = config.objective
        assert isinstance(objective, PaperObjective)
        return step_weights(coefficients, sigmas, objective.target, objective.weighting)

    @property
    def measures(self) -> tuple[str, ...]:
        target = ("target_kl",) if self._extrapolation else ()
        return (self.measure, *target, *(("anchor_kl",) if self._anchor_weight else ()))

    def __call__(self, velocity: Tensor, steps: Tensor, known: TeacherVelocities) -> tuple[Tensor, dict[str, Tensor]]:
        steps = steps.to(velocity.device)
        target, error = known.teacher, velocity_error(velocity, known.teacher)
        measured = {self.measure: self._kl[steps] * error}
        if known.base is not None:
            teacher = known.teacher.float()
            target = teacher + self._extrapolation * (teacher - known.base.float())
            error = velocity_error(velocity, target)
            measured["target_kl"] = self._kl[steps] * error
        loss = self._against(target, velocity, steps, error, known)
        if known.anchor is not None:
            anchor = velocity_error(velocity, known.anchor)
            loss = loss + self._anchor_weight * self._weights[steps] * anchor
            measured["anchor_kl"] = self._kl[steps] * anchor
        return loss, measured

    def _against(
        self, target: Tensor, velocity: Tensor, steps: Tensor, error: Tensor, known: TeacherVelocities
    ) -> Tensor:
        """The loss of each pair float32 [b]; `error`: of `velocity` to `target`."""
        return self._weights[steps] * error


class FlowMatchingLoss(ClosedFormLoss):
    """The plain squared error to the flow of the teacher's images.

    Measured as `flow_error`: the KL's weight times that error.
    """

    measure = "flow_error"

    @staticmethod
    def _step_weights(config: DistilConfig, coefficients: Coefficients, sigmas: Tensor) -> Tensor:
        return torch.full_like(kl_weight(coefficients), 0.5)


class PolicyGradientLoss(ClosedFormLoss):
    """The KL's policy-gradient estimator, per latent dimension as the closed form is; on a step without noise, which
    has no likelihood, the closed form itself.
    """

    def __init__(self, config: DistilConfig, coefficients: Coefficients, sigmas: Tensor, device: torch.device) -> None:
        super().__init__(config, coefficients, sigmas, device)
        assert isinstance(config.objective, PaperObjective)
        self._clip = config.objective.clip
        self._b, self._std = (table.to(device, torch.float32) for table in (coefficients.b, coefficients.std))

    def _against(
        self, target: Tensor, velocity: Tensor, steps: Tensor, error: Tensor, known: TeacherVelocities
    ) -> Tensor:
        assert isinstance(known, DrawnTransitions)
        assert known.velocity is not None
        assert known.noise is not None
        std = self._std[steps]
        noisy = std > 0
        drawn = ppo_style_loss(
            velocity,
            known.velocity,
            target,
            known.noise,
            self._b[steps],
            torch.where(noisy, std, 1.0),
            self._clip,
        )
        return torch.where(noisy, drawn / velocity[0].numel(), self._weights[steps] * error)
