"""How much the gradient of a distillation varies: the closed-form KL against the PPO-style estimator of it.

Everything is on-policy and at one point: the student is the base, before any step. With states s of a rollout of the
student (kernel `flow`), drawn transitions eps and one step t of the trajectory, let

    g_closed(s)   = d/dtheta  mean over the batch of  KL_t(student || teacher)            at the states s
    g_ppo(s, eps) = d/dtheta  mean over the batch of  `ppo_style_loss` with the noise eps  at the states s

both per latent dimension and over all parameters. Given s, g_closed is a constant and E[g_ppo | s] = g_closed(s).
A variance is the trace of a covariance, estimated without bias from n draws, sum ||g - mean||^2 / (n - 1):

- `variance`: over rollouts, each with prompts, states and transitions of its own: states and noise together;
- `noise_variance`: over transitions redrawn at the states of one rollout; exactly 0 for the closed form;
- `mean_norm2`: ||mean over the rollouts||^2 (it still holds variance / n of noise);
- `ratio`: variance of the PPO-style estimator / variance of the closed form; over all steps, that of their sums;
- `distance2`: ||mean of g_ppo over the redrawn transitions - g_closed||^2 at the same states; where the estimator has
  no bias its expectation is `distance2_expected` = noise_variance / draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_ds.data import draw_prompts
from opd_ds.diffusion import Coefficients, kernel, kl_weight, ppo_style_loss, velocity_error
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Keep, Rows, Trajectory, rollout
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, ModelFamily

Report = dict[str, Any]


@dataclass(frozen=True)
class Draws:
    """How much is drawn.

    Attributes:
        batch: states per step and rollout.
        rollouts: for the variance over rollouts.
        transitions: redrawn at the states of the first rollout.
    """

    batch: int = 16
    rollouts: int = 32
    transitions: int = 32
    steps: int = 10
    noise_level: float = 0.7
    seed: int = 0


class Spread:
    """Mean and total variance of vectors [P] that are added one by one."""

    def __init__(self) -> None:
        self.count, self._sum, self._squares = 0, torch.zeros(()), 0.0

    def add(self, vector: Tensor) -> None:
        exact = vector.double()
        self.count += 1
        self._sum = self._sum + exact
        self._squares += float(exact.square().sum())

    @property
    def mean(self) -> Tensor:
        """[P], float64."""
        return self._sum / self.count

    @property
    def variance(self) -> float:
        """The trace of the sample covariance."""
        return (self._squares - self.count * float(self.mean.square().sum())) / (self.count - 1)


def gradient_variance(
    family: ModelFamily, student: nn.Module, teacher: nn.Module, prompts: list[str], draws: Draws
) -> Report:
    """See the module.

    Args:
        student, teacher: networks of the family; the student's parameters that require gradients are looked at.
        prompts: each rollout draws from these.

    Returns:
        `settings`, `steps` (one entry a step) and `ratio`, as plain data.

    Raises:
        UserError: student and teacher answer alike, so that there is no gradient to compare.
    """
    at_states = _Gradients(family, student, teacher, draws)
    spreads = [{"closed_form": Spread(), "ppo": Spread()} for _ in range(draws.steps)]
    redrawn: list[tuple[Spread, Tensor]] = []
    for number in range(draws.rollouts):
        rolled, cond = at_states.roll_out(prompts, number)
        assert rolled.states is not None
        assert rolled.noise is not None
        for step, spread in enumerate(spreads):
            closed, ppo = at_states.of(rolled.states[:, step], cond, step)
            exact = closed()
            spread["closed_form"].add(exact)
            spread["ppo"].add(ppo(rolled.noise[:, step]))
            if number == 0:
                seeds = [sample_seed(draws.seed, step, "gradients/redrawn", i) for i in range(draws.batch)]
                noise, over_noise = SampleNoise(seeds, family.latent_shape), Spread()
                for _ in range(draws.transitions):
                    over_noise.add(ppo(noise.draw(slice(None))))
                redrawn.append((over_noise, exact))
    if not all(spread["closed_form"].variance > 0 for spread in spreads):
        raise UserError("gradient variance: the teacher answers as the student does; give one that has learned more")
    steps: list[Report] = [
        {"step": step, "sigma": float(at_states.sigmas[step])} | _entry(spread, *redrawn[step])
        for step, spread in enumerate(spreads)
    ]
    totals = {kind: sum(entry[kind]["variance"] for entry in steps) for kind in ("closed_form", "ppo")}
    return {"settings": asdict(draws), "steps": steps, "ratio": totals["ppo"] / totals["closed_form"]}


def _entry(spread: dict[str, Spread], over_noise: Spread, exact: Tensor) -> Report:
    noise_variance = {"closed_form": 0.0, "ppo": over_noise.variance}
    kinds = {
        kind: {
            "mean_norm2": float(one.mean.square().sum()),
            "variance": one.variance,
            "noise_variance": noise_variance[kind],
        }
        for kind, one in spread.items()
    }
    return kinds | {
        "ratio": spread["ppo"].variance / spread["closed_form"].variance,
        "distance2": float((over_noise.mean - exact.double()).square().sum()),
        "distance2_expected": over_noise.variance / over_noise.count,
    }


class _Gradients:
    """Rollouts of the student, and both gradients at given states."""

    def __init__(self, family: ModelFamily, student: nn.Module, teacher: nn.Module, draws: Draws) -> None:
        self._family, self._student, self._teacher, self._draws = family, student, teacher, draws
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.sigmas = family.sigmas(draws.steps)
        self._table: Coefficients = kernel("flow", draws.noise_level).coefficients(self.sigmas)
        self._weights = kl_weight(self._table).float()

    @torch.no_grad()
    def roll_out(self, prompts: list[str], number: int) -> tuple[Trajectory, Conditioning]:
        draws = self._draws
        rows = draw_prompts(len(prompts), draws.batch, draws.seed, number, "gradients")
        cond = self._family.encode([prompts[row] for row in rows])
        seeds = [sample_seed(draws.seed, number, "gradients", i) for i in range(draws.batch)]

        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            return self._family.velocity(self._student, x, sigma, cond)

        noise = SampleNoise(seeds, self._family.latent_shape)
        keep = Keep(torch.arange(draws.steps).expand(draws.batch, -1), self._family.dtype, transitions=True)
        return rollout(predict, noise, self._table, self.sigmas, device=self._family.device, keep=keep), cond

    def of(
        self, states: Tensor, cond: Conditioning, step: int
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """At `states` [B, C, ...] of `step`: the closed form's gradient, and the PPO-style one by drawn noise.

        One forward serves them all; gradients are [P].
        """
        sigma = torch.full((len(states),), float(self.sigmas[step]), device=states.device)
        velocity = self._family.velocity(self._student, states, sigma, cond)
        with torch.no_grad():
            target = self._family.velocity(self._teacher, states, sigma, cond)
        b, std = (torch.full_like(sigma, float(column[step])) for column in (self._table.b, self._table.std))

        def closed() -> Tensor:
            return self._gradient((self._weights[step] * velocity_error(velocity, target)).mean())

        def ppo(noise: Tensor) -> Tensor:
            losses = ppo_style_loss(velocity, velocity.detach(), target, noise.to(states.device), b, std)
            return self._gradient(losses.mean() / velocity[0].numel())

        return closed, ppo

    def _gradient(self, loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(
            loss, self._parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])


def main(teacher: str, task: str, out: Path, batch: int, rollouts: int, transitions: int) -> None:
    """At the miniature's base, for the teacher at a path, on a task's training prompts: writes a JSON."""
    from opd_ds.config.loading import load_config
    from opd_ds.config.paths import resolve_path
    from opd_ds.config.sections import StudentSection
    from opd_ds.data import PromptSet
    from opd_ds.training.networks import load_family, student_module
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    config = load_config("miniature", None, [])
    family = load_family(config, resolve_path(config.model.path, "model.path"), torch.device("cpu"))
    prompts = PromptSet.read(config.tasks[task].prompts, f"tasks.{task}.prompts").prompts
    student = student_module(StudentSection(), 0, family, None)
    specialist = student_module(StudentSection(), 0, family, resolve_path(teacher, "--teacher"))
    draws = Draws(batch, rollouts, transitions, steps=config.rollout.steps)
    report = gradient_variance(family, student, specialist, list(prompts), draws) | {"task": task}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import sys

    import typer

    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"opd-ds: error: {error}")
