"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the task's teacher is asked at the states visited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from opd_ds.config.schema import DistilConfig
from opd_ds.data import PromptSet
from opd_ds.diffusion import Coefficients, kl_weight, ppo_style_loss, step_weights, velocity_error
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import chunks
from opd_ds.engine import Group, ShardedEma, StudentEngine
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.training.accumulator import LossTerm, RoundAccumulator, RoundLosses
from opd_ds.training.buffer import TrajectoryBuffer, noised_states
from opd_ds.training.teachers import ANCHOR, TeacherPool
from opd_ds.training.trainer import TaskBatch, Trainer


@dataclass(frozen=True)
class RolloutGroup:
    """Tasks that are rolled out together, as they share one student guidance: a step is one forward for all of them.

    Attributes:
        rows: of each task, one after the other.
    """

    guidance: float
    rows: dict[str, slice]
    cond: Conditioning
    noise: SampleNoise

    @property
    def sizes(self) -> list[int]:
        return [rows.stop - rows.start for rows in self.rows.values()]

    def of(self, task: str, rows: slice) -> slice:
        """What of `rows` is the task's, counted from the start of `rows`; it may be empty."""
        own = self.rows[task]
        first = max(own.start, rows.start)
        return slice(first - rows.start, max(min(own.stop, rows.stop), first) - rows.start)


class DistillationLoss:
    """The run's objective at one micro-batch of pairs; a `Loss`.

    The part that is compared with the teacher, plus `anchor_weight` times the same with the anchor. Measured as `kl`:
    the exact KL to the teacher (without noise: mean matching), whatever is minimised; as `flow_error`, for `sft`, the
    same weight times the distance to what flow matching asks for.
    """

    def __init__(self, config: DistilConfig, coefficients: Coefficients, sigmas: Tensor, device: torch.device) -> None:
        chosen = config.objective
        self._method, self._clip = chosen.method, chosen.clip
        self.measure = "flow_error" if chosen.method == "sft" else "kl"
        self._anchor_weight = config.anchor.weight if config.anchor else 0.0
        weights = step_weights(coefficients, sigmas, chosen.target, chosen.weighting)
        if chosen.method == "sft":  # flow matching is the plain squared error
            weights = torch.full_like(weights, 0.5)
        tables = (weights, kl_weight(coefficients), coefficients.b, coefficients.std)
        self._weights, self._kl, self._b, self._std = (table.to(device, torch.float32) for table in tables)

    def __call__(self, velocity: Tensor, steps: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        steps = steps.to(velocity.device)
        error = velocity_error(velocity, known["teacher"])
        loss = self._policy_gradient(velocity, steps, known) if self._method == "ppo" else self._weights[steps] * error
        measured = {self.measure: self._kl[steps] * error}
        if self._anchor_weight:
            anchor = velocity_error(velocity, known["anchor"])
            loss = loss + self._anchor_weight * self._weights[steps] * anchor
            measured["anchor_kl"] = self._kl[steps] * anchor
        return loss, measured

    def _policy_gradient(self, velocity: Tensor, steps: Tensor, known: dict[str, Tensor]) -> Tensor:
        """Per latent dimension, as the closed form is; a step without noise has no likelihood: there it is that one."""
        std = self._std[steps]
        noisy = std > 0
        drawn = ppo_style_loss(
            velocity,
            known["velocity"],
            known["teacher"],
            known["noise"],
            self._b[steps],
            torch.where(noisy, std, 1.0),
            self._clip,
        )
        exact = self._weights[steps] * velocity_error(velocity, known["teacher"])
        return torch.where(noisy, drawn / velocity[0].numel(), exact)


class Distillation(Trainer):
    """Rounds of several teachers into one student."""

    def __init__(
        self,
        config: DistilConfig,
        group: Group,
        family: ModelFamily,
        student: StudentEngine,
        ema: ShardedEma | None,
        prompts: dict[str, PromptSet],
        teachers: TeacherPool,
    ) -> None:
        super().__init__(config, group, family, student, ema, prompts)
        self._config, self._teachers = config, teachers
        self._loss = DistillationLoss(config, self._coefficients, self._sigmas, group.device)
        self.measures = (self._loss.measure, "anchor_kl") if config.anchor else (self._loss.measure,)

    def _learn(
        self, index: int, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]
    ) -> tuple[RoundLosses, float]:
        if self._config.rollout.mode == "fused":
            return self._optimize(lambda: self._train_fused(draws, conds))
        with self._phase("rollout"):
            if self._config.objective.method == "sft":
                buffers = self._drawn_by_teachers(index, draws, conds)
            else:
                buffers = self._drawn_by_student(draws, conds)
        with self._phase("score"):
            self._ask_teachers(buffers)
        pairs: dict[str, float] = {task: draw.pairs for task, draw in draws.items()}
        for _ in range(self._config.train.inner_epochs):
            losses, grad_norm = self._optimize(lambda: self._train(buffers, pairs, self._loss))
        return losses, grad_norm

    def _joined(self, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]) -> list[RolloutGroup]:
        together: dict[float, list[str]] = {}
        for task in draws:
            together.setdefault(self._guidance(task), []).append(task)
        joined = []
        for guidance, tasks in together.items():
            ends = list(accumulate(len(draws[task].part) for task in tasks))
            rows = {task: slice(end - len(draws[task].part), end) for task, end in zip(tasks, ends, strict=True)}
            cond = Conditioning.cat([conds[task] for task in tasks])
            joined.append(RolloutGroup(guidance, rows, cond, SampleNoise.cat([draws[task].noise for task in tasks])))
        return joined

    def _drawn_by_student(
        self, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]
    ) -> dict[str, TrajectoryBuffer]:
        with_noise = self._config.objective.method == "ppo"
        buffers = {}
        with self._student.gathered() as student:
            for joined in self._joined(draws, conds):
                rolled = self._roll_out(student, joined.cond, joined.noise, joined.guidance, transitions=with_noise)
                for task, own in zip(joined.rows, rolled.split(joined.sizes), strict=True):
                    assert own.states is not None
                    self._final[task] = own.final
                    draw = draws[task]
                    buffers[task] = TrajectoryBuffer(own.states, draw.chosen, draw.part.weights, conds[task])
                    if own.velocity is not None and own.noise is not None:
                        buffers[task].per_state = {"velocity": own.velocity, "noise": own.noise}
        return {task: buffers[task] for task in draws}

    def _drawn_by_teachers(
        self, index: int, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]
    ) -> dict[str, TrajectoryBuffer]:
        """The teachers' pictures, noised afresh, with the velocity that flow matching asks for as the teacher's."""
        buffers = {}
        for task, draw in draws.items():
            with self._teachers.active(task) as teacher:
                final = self._roll_out(teacher, conds[task], draw.noise, self._teachers.guidance(task)).final
            seeds = [sample_seed(self._config.run.seed, index, f"{task}/noised", i) for i in draw.part.indices]
            noised = noised_states(
                final, SampleNoise(seeds, self._family.latent_shape), self._sigmas, self._family.dtype
            )
            assert noised.states is not None
            assert noised.velocity is not None
            self._final[task] = final
            buffers[task] = TrajectoryBuffer(noised.states, draw.chosen, draw.part.weights, conds[task])
            buffers[task].per_state = {"teacher": noised.velocity}
        return buffers

    def _ask_teachers(self, buffers: dict[str, TrajectoryBuffer]) -> None:
        """One pass per teacher over all steps and samples of the round; the anchor over all tasks."""
        if self._config.objective.method != "sft":
            following = [*list(buffers)[1:], ANCHOR if self._config.anchor else None]
            for (task, buffer), then in zip(buffers.items(), following, strict=True):
                with self._teachers.active(task) as teacher:
                    if then is not None:
                        self._teachers.prefetch(then)
                    self._query_frozen("teacher", teacher, buffer, self._teachers.guidance(task))
        if self._config.anchor:
            with self._teachers.active(ANCHOR) as anchor:
                for buffer in buffers.values():
                    self._query_frozen("anchor", anchor, buffer, self._teachers.guidance(ANCHOR))

    # ---- fused: the rollout's forward is the training forward ----

    def _train_fused(self, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]) -> RoundAccumulator:
        """Per step one student and one teacher pass, nothing stored."""
        settings = self._config.rollout
        # With random queries any step may be some sample's; the others then weigh 0, so that ranks stay in step.
        first = next(iter(draws.values()))
        trained = range(settings.steps) if settings.trained_steps.queries else first.chosen[0].tolist()
        together = self._joined(draws, conds)
        parts = sum(len(chunks(len(joined.cond), settings.micro_batch)) for joined in together) * len(trained)
        accumulator = self._accumulator(list(draws), parts)
        for joined in together:
            rolled = self._rollout(self._fused_step(joined, draws, set(trained), accumulator), joined.noise)
            for task, own in zip(joined.rows, rolled.split(joined.sizes), strict=True):
                self._final[task] = own.final
        return accumulator

    def _fused_step(
        self, joined: RolloutGroup, draws: dict[str, TaskBatch], trained: set[int], accumulator: RoundAccumulator
    ) -> Callable[[Tensor, Tensor, slice, int], Tensor]:
        steps = self._config.rollout.steps
        chosen = {
            task: torch.zeros(len(draws[task].part), steps).scatter_(1, draws[task].chosen, 1.0) for task in joined.rows
        }
        weights = torch.cat([chosen[task] * draws[task].part.weights[:, None] for task in joined.rows])

        def predict(x: Tensor, sigma: Tensor, rows: slice, step: int) -> Tensor:
            state, cond = x.to(self._family.dtype), joined.cond[rows]
            with torch.set_grad_enabled(step in trained):
                velocity = self._velocity(self._student, state, sigma, cond, joined.guidance)
            if step in trained:
                known = {"teacher": self._routed(joined, state, sigma, cond, rows)}
                if self._config.anchor:
                    known["anchor"] = self._asked(ANCHOR, state, sigma, cond)
                at = torch.full((len(x),), step)
                losses, measured = self._loss(velocity, at, known)
                shares = []
                for task in joined.rows:
                    own = joined.of(task, rows)
                    of_task = {name: values[own] for name, values in measured.items()}
                    share = weights[rows, step][own]
                    shares.append(LossTerm(task, losses[own], of_task, at[own], share, draws[task].pairs))
                accumulator.add(*shares)
            return velocity.detach()

        return predict

    def _routed(self, joined: RolloutGroup, state: Tensor, sigma: Tensor, cond: Conditioning, rows: slice) -> Tensor:
        """Each task's teacher at its own rows."""
        asked = []
        for task in joined.rows:
            own = joined.of(task, rows)
            if own.start < own.stop:
                asked.append(self._asked(task, state[own], sigma[own], cond[own]))
        return torch.cat(asked)

    @torch.no_grad()
    def _asked(self, teacher: str, state: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with self._teachers.active(teacher) as network:
            return self._velocity(network, state, sigma, cond, self._teachers.guidance(teacher))
