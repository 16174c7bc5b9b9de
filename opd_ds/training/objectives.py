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

    Attributes:
        teacher_branches, anchor_branches, base_branches: what guidance made them of, where it is known: [b, 2, C, ...],
            by the negative prompt and by the prompt.
    """

    teacher: Tensor
    anchor: Tensor | None = None
    base: Tensor | None = None
    teacher_branches: Tensor | None = None
    anchor_branches: Tensor | None = None
    base_branches: Tensor | None = None


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
    extrapolated target that does not fall to 0, and `target_kl` is the same to the target. `cond_kl` and `uncond_kl`
    are the same of the two branches of guidance, to the teacher's, where both have two.

    With `objective.guided` = apart the squared error is that of v_c, plus `direction_weight` times that of v_c - v_u,
    for teacher and anchor alike (PDM, arXiv 2607.24731).
    """

    measure = "kl"

    def __init__(self, config: DistilConfig, coefficients: Coefficients, sigmas: Tensor, device: torch.device) -> None:
        self._anchor_weight = config.anchor.weight if config.anchor else 0.0
        self._extrapolation = config.objective.extrapolation
        self._direction = config.objective.direction_weight if config.objective.guided == "apart" else None
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
        return (self.measure, *target, *(("anchor_kl",) if self._anchor_weight else ()), "cond_kl", "uncond_kl")

    def __call__(
        self, velocity: Tensor, steps: Tensor, known: TeacherVelocities, branches: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`branches`: of `velocity` [b, 2, C, ...], where guidance took two passes."""
        steps = steps.to(velocity.device)
        kl, target = self._kl[steps], self._beyond(known.teacher, known.base)
        error = velocity_error(velocity, known.teacher)
        measured = {self.measure: kl * error}
        if known.base is not None:
            error = velocity_error(velocity, target)
            measured["target_kl"] = kl * error
        if branches is not None and known.teacher_branches is not None:
            for place, name in enumerate(("uncond_kl", "cond_kl")):
                measured[name] = kl * velocity_error(branches[:, place], known.teacher_branches[:, place])
        if self._direction is not None:
            assert known.teacher_branches is not None
            error = self._apart(branches, self._beyond(known.teacher_branches, known.base_branches))
        loss = self._against(target, velocity, steps, error, known)
        if known.anchor is not None:
            error = velocity_error(velocity, known.anchor)
            measured["anchor_kl"] = kl * error
            if self._direction is not None:
                error = self._apart(branches, known.anchor_branches)
            loss = loss + self._anchor_weight * self._weights[steps] * error
        return loss, measured

    def _beyond(self, teacher: Tensor, base: Tensor | None) -> Tensor:
        """What the student is to predict: what the teacher does, or beyond it as seen from the base, in float32."""
        return teacher if base is None else teacher.float() + self._extrapolation * (teacher.float() - base.float())

    def _apart(self, ours: Tensor | None, theirs: Tensor | None) -> Tensor:
        """Squared errors of branches [b, 2, C, ...]: by the prompt, plus `direction_weight` times the direction."""
        assert ours is not None
        assert theirs is not None
        assert self._direction is not None
        uncond, cond = (ours.float() - theirs.float()).unbind(1)
        return cond.square().flatten(1).mean(1) + self._direction * (cond - uncond).square().flatten(1).mean(1)

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
