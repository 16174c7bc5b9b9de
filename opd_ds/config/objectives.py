"""Algorithms that distil: what the student's velocities are compared with, and how."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from opd_ds.config.base import Algorithm


class Objective(Algorithm):
    """A way to learn from teachers; `method` is its name."""

    title: ClassVar[str] = "On-policy distillation (arXiv 2605.15055)"

    method: str
    extrapolation: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="lambda in the target v_T + lambda (v_T - v_base), beyond the teacher as seen from model.path "
        "(ExOPD, arXiv 2602.12125, has 0.25); 0: the teacher itself, and the base is not asked",
    )

    @model_validator(mode="after")
    def _something_to_extrapolate(self) -> Objective:
        if self.extrapolation and not self.asks_teacher:
            raise ValueError(
                f"extrapolation = {self.extrapolation:g} goes beyond velocities of the teacher, and method = "
                f"{self.method!r} asks for none; leave it out, or use another method"
            )
        return self


class PaperObjective(Objective):
    """What DiffusionOPD (arXiv 2605.15055) and its comparisons have in common."""

    target: Literal["transition", "velocity", "x0"] = Field(
        "transition",
        description="what student and teacher are compared in: the mean of the next state, the velocity, or the image "
        "that it predicts",
    )
    weighting: Literal["kl", "uniform", "normalized"] = Field(
        "kl",
        description="of the steps: the exact KL's (for transition only), half the squared error of the target, or "
        "that scaled to a mean of 1 over the steps",
    )
    guided: Literal["together", "apart"] = Field(
        "together",
        description="of a guided velocity v_u + g (v_c - v_u): together compares it as a whole; apart compares v_c and "
        "v_c - v_u (PDM, arXiv 2607.24731); for method = 'closed_form'",
    )
    direction_weight: PositiveFloat = Field(
        1.0, description="factor on the squared error of v_c - v_u beside that of v_c; read with guided = 'apart' only"
    )
    clip: PositiveFloat = Field(
        1e-4, description="the likelihood ratio counts as 1 - clip to 1 + clip; read with method = 'ppo' only"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PaperObjective:
        if self.method != "closed_form" and (self.target, self.weighting) != ("transition", "kl"):
            raise ValueError(
                f"method = {self.method!r} has an objective of its own; leave target and weighting out, or use "
                "method = 'closed_form'"
            )
        if self.guided == "apart" and self.method != "closed_form":
            raise ValueError(
                f"guided = 'apart' is an objective of its own beside method = {self.method!r}; use 'closed_form'"
            )
        if self.weighting == "kl" and self.target != "transition":
            raise ValueError(f"weighting = 'kl' belongs to target = 'transition', not {self.target!r}; use 'uniform'")
        return self


class ClosedForm(PaperObjective):
    """The exact KL per step on the student's own states."""

    trainer: ClassVar[str] = "opd_ds.training.distillation:Distillation"
    fused_trainer: ClassVar[str] = "opd_ds.training.fused:FusedDistillation"
    rewarded_trainer: ClassVar[str] = "opd_ds.training.rl.reward_term:RewardedDistillation"

    method: Literal["closed_form"] = "closed_form"


class PolicyGradient(PaperObjective):
    """The same by its policy-gradient estimator, for comparison. Velocities and drawn noise of every state are kept."""

    trainer: ClassVar[str] = "opd_ds.training.policy_gradient:PolicyGradientDistillation"
    kept_per_state: ClassVar[int] = 2

    method: Literal["ppo"]

    @property
    def needs_noise(self) -> bool:
        return True


class FlowMatching(PaperObjective):
    """Flow matching on images that the teacher draws (off-policy); the flow at every state is kept."""

    trainer: ClassVar[str] = "opd_ds.training.flow_matching:FlowMatching"
    drawn_by: ClassVar[Literal["student", "teacher"]] = "teacher"
    kept_per_state: ClassVar[int] = 1

    method: Literal["sft"]
