"""Distillation by the KL's policy-gradient estimator, which the paper compares its closed form with."""

from __future__ import annotations

from collections.abc import Callable

from opd_ds.diffusion.rollout import Trajectory
from opd_ds.training.buffer import Pairs, PerPair, PerState
from opd_ds.training.distillation import Distillation
from opd_ds.training.objectives import DrawnTransitions, PolicyGradientLoss, TeacherVelocities


class PolicyGradientDistillation(Distillation):
    """The loss weighs the transitions that were drawn, so their velocities and noise are kept."""

    loss_class = PolicyGradientLoss
    keeps_transitions = True

    def _known(
        self, trajectory: Trajectory, teacher: PerPair, anchor: PerPair | None
    ) -> Callable[[Pairs], TeacherVelocities]:
        assert trajectory.velocity is not None
        assert trajectory.noise is not None
        velocity, noise = PerState(trajectory.velocity), PerState(trajectory.noise)
        return lambda pairs: DrawnTransitions(
            teacher.at(pairs), anchor.at(pairs) if anchor else None, velocity.at(pairs), noise.at(pairs)
        )
