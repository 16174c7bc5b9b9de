"""Distillation by the KL's policy-gradient estimator, which the paper compares its closed form with."""

from __future__ import annotations

from opd_ds.training.distillation import Distillation
from opd_ds.training.objectives import DrawnTransitions, PolicyGradientLoss


class PolicyGradientDistillation(Distillation):
    """The loss weighs the transitions that were drawn, so their velocities and noise are kept."""

    loss_class = PolicyGradientLoss
    known_class = DrawnTransitions
    keeps_transitions = True
