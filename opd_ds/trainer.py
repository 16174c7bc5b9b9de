"""The round: prompts, rollout, teachers, accumulated KL over all tasks, one step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ds.accumulate import RoundAccumulator, RoundLosses, StepObjective
from opd_ds.buffer import TrajectoryBuffer, choose_steps
from opd_ds.config import RunConfig
from opd_ds.diffusion import kernel
from opd_ds.engine import Group, ShardedEma, StudentEngine
from opd_ds.errors import NonFiniteError
from opd_ds.models import Conditioning, ModelFamily, guided_velocity
from opd_ds.prompts import PromptSet, SampleNoise, Shard, draw_prompts, sample_seed, shard
from opd_ds.rollout import Trajectory, chunks, rollout
from opd_ds.teachers import TeacherPool


@dataclass(frozen=True)
class Rolled:
    """Where one task's trajectories of a round ended on this rank: `final` [B, C, h, w] float32, on the device."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    final: Tensor


@dataclass(frozen=True)
class RoundReport:
    """What a round measured, equal on all ranks but for `seconds` (this rank's, per phase) and `rolled`."""

    round: int
    losses: RoundLosses
    grad_norm: float
    learning_rate: float
    samples: int
    seconds: dict[str, float]
    rolled: dict[str, Rolled]


@dataclass(frozen=True)
class Draw:
    """One task's samples of a round on this rank: prompts, noise, trained steps [B, K]."""

    part: Shard
    prompts: list[str]
    metadata: list[dict[str, Any]]
    noise: SampleNoise
    chosen: Tensor

    @property
    def pairs(self) -> int:
        """(sample, step) pairs over all ranks."""
        return self.part.total * self.chosen.shape[1]


class Trainer:
    """Runs rounds. All randomness is named by (seed, round, task, sample index), so there is no such state to save."""

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        family: ModelFamily,
        student: StudentEngine,
        ema: ShardedEma | None,
        teachers: TeacherPool,
        prompts: dict[str, PromptSet],
    ) -> None:
        self._config, self._group, self._family = config, group, family
        self._student, self._ema, self._teachers, self._prompts = student, ema, teachers, prompts
        self._kernel = kernel(config.rollout.kernel, config.rollout.noise_level)
        self._sigmas = family.sigmas(config.rollout.steps)
        coefficients = self._kernel.coefficients(self._sigmas)
        self._objective = StepObjective(config, coefficients, self._sigmas, group.device)
        self._uncond = family.encode([config.model.negative_prompt])
        self._seconds: dict[str, float] = {}
        self._final: dict[str, Tensor] = {}
        self._round, self._doing = 0, ""

    def run_round(self, index: int) -> RoundReport:
        """Round `index`, counted from 0. Collective.

        Raises:
            NonFiniteError: the loss is not finite (raised before the step), or the gradient norm is not.
        """
        self._seconds = {}
        self._round = index + 1
        with self._phase("encode"):
            draws = {task: self._draw(index, task) for task in self._config.tasks}
            conds = self._encode(draws)
        if self._config.rollout.mode == "fused":
            losses, grad_norm = self._optimize(index, lambda: self._train_fused(draws, conds))
        else:
            with self._phase("rollout"):
                buffers = self._fill_buffers(draws, conds)
            with self._phase("score"):
                self._score(buffers)
            for _ in range(self._config.train.inner_epochs):
                losses, grad_norm = self._optimize(index, lambda: self._train_buffered(draws, buffers))
        samples = self._config.rollout.samples * len(draws)
        rolled = {task: Rolled(draw.prompts, draw.metadata, self._final[task]) for task, draw in draws.items()}
        learning_rate = self._student.learning_rate
        return RoundReport(index + 1, losses, grad_norm, learning_rate, samples, dict(self._seconds), rolled)

    # ---- the stages, in order ----

    def _draw(self, index: int, task: str) -> Draw:
        settings, seed = self._config.rollout, self._config.run.seed
        part = shard(settings.samples, self._group.world.rank, self._group.world.size)
        known = self._prompts[task]
        drawn = draw_prompts(len(known), settings.samples, seed, index, task)
        rows = [drawn[i] for i in part.indices]
        noise = SampleNoise([sample_seed(seed, index, task, i) for i in part.indices], self._family.latent_shape)
        chosen = choose_steps(settings.trained_steps, settings.steps, seed, index, task, part.indices)
        return Draw(part, [known.prompts[i] for i in rows], [known.metadata[i] for i in rows], noise, chosen)

    def _encode(self, draws: dict[str, Draw]) -> dict[str, Conditioning]:
        """All tasks' prompts in one pass, so that encoders which are offloaded travel once a round."""
        everything = self._family.encode([prompt for draw in draws.values() for prompt in draw.prompts])
        share = len(everything) // len(draws)
        return {task: everything[slice(k * share, (k + 1) * share)] for k, task in enumerate(draws)}

    def _fill_buffers(self, draws: dict[str, Draw], conds: dict[str, Conditioning]) -> dict[str, TrajectoryBuffer]:
        """Tasks with one student guidance are rolled out together: a step is one forward for all of them."""
        together: dict[float, list[str]] = {}
        for task in draws:
            together.setdefault(self._guidance(task), []).append(task)
        states: dict[str, Tensor] = {}
        for guidance, tasks in together.items():
            cond = Conditioning.cat([conds[task] for task in tasks])
            noise = SampleNoise.cat([draws[task].noise for task in tasks])
            rolled = self._roll_out(cond, noise, guidance)
            assert rolled.states is not None
            sizes = [len(draws[task].part) for task in tasks]
            states |= dict(zip(tasks, rolled.states.split(sizes), strict=True))
            self._final |= dict(zip(tasks, rolled.final.split(sizes), strict=True))
        return {t: TrajectoryBuffer(states[t], draw.chosen, draw.part.weights, conds[t]) for t, draw in draws.items()}

    @torch.no_grad()
    def _roll_out(self, cond: Conditioning, noise: SampleNoise, guidance: float) -> Trajectory:
        """The student's trajectories, states kept."""

        def predict(x: Tensor, sigma: Tensor, rows: slice, step: int) -> Tensor:
            return self._velocity(self._student, x, sigma, cond[rows], guidance)

        return self._rollout(predict, noise, states_dtype=self._family.dtype)

    def _score(self, buffers: dict[str, TrajectoryBuffer]) -> None:
        """One pass per teacher over all steps and samples of the round."""
        for task, buffer in buffers.items():
            guidance = self._teachers.guidance(task)
            with self._teachers.active(task) as teacher, torch.no_grad():
                for pairs in buffer.micro_batches(self._config.scoring_micro_batch):
                    states, sigma, cond = buffer.inputs(pairs, self._sigmas)
                    buffer.teacher_velocity.append(self._velocity(teacher, states, sigma, cond, guidance))

    def _train_buffered(self, draws: dict[str, Draw], buffers: dict[str, TrajectoryBuffer]) -> RoundAccumulator:
        size = self._config.train.micro_batch
        work = [(task, buffer, *scored) for task, buffer in buffers.items() for scored in buffer.scored(size)]
        accumulator = RoundAccumulator(self._student, self._objective, self._group, len(work))
        for task, buffer, pairs, target in work:
            states, sigma, cond = buffer.inputs(pairs, self._sigmas)
            velocity = self._velocity(self._student, states, sigma, cond, self._guidance(task))
            accumulator.add(task, velocity, target, pairs.step, buffer.weights[pairs.sample], draws[task].pairs)
        return accumulator

    def _train_fused(self, draws: dict[str, Draw], conds: dict[str, Conditioning]) -> RoundAccumulator:
        """The rollout's forward is the training forward: per step one student and one teacher pass, nothing stored."""
        settings = self._config.rollout
        # With random queries any step may be some sample's; the others then weigh 0, so that ranks stay in step.
        first = next(iter(draws.values()))
        trained = range(settings.steps) if settings.trained_steps.queries else first.chosen[0].tolist()
        parts = len(chunks(len(first.part), settings.micro_batch)) * len(trained) * len(draws)
        accumulator = RoundAccumulator(self._student, self._objective, self._group, parts)
        for task, draw in draws.items():
            chosen = torch.zeros(len(draw.part), settings.steps).scatter_(1, draw.chosen, 1.0)
            with self._teachers.active(task) as teacher:
                predict = self._fused_step(task, draw, conds[task], teacher, chosen, set(trained), accumulator)
                self._final[task] = self._rollout(predict, draw.noise).final
        return accumulator

    def _fused_step(
        self,
        task: str,
        draw: Draw,
        cond: Conditioning,
        teacher: Any,
        chosen: Tensor,
        trained: set[int],
        accumulator: RoundAccumulator,
    ) -> Callable[[Tensor, Tensor, slice, int], Tensor]:
        def predict(x: Tensor, sigma: Tensor, rows: slice, step: int) -> Tensor:
            state = x.to(self._family.dtype)
            with torch.set_grad_enabled(step in trained):
                velocity = self._velocity(self._student, state, sigma, cond[rows], self._guidance(task))
            if step in trained:
                with torch.no_grad():
                    target = self._velocity(teacher, state, sigma, cond[rows], self._teachers.guidance(task))
                weights = chosen[rows, step] * draw.part.weights[rows]
                accumulator.add(task, velocity, target, torch.full((len(x),), step), weights, draw.pairs)
            return velocity.detach()

        return predict

    def _optimize(self, index: int, train: Callable[[], RoundAccumulator]) -> tuple[RoundLosses, float]:
        """Accumulate, check, one optimizer step, EMA."""
        with self._phase("train"):
            losses = train().measure()
        if not math.isfinite(losses.loss):
            bad = [task for task, kl in losses.task_kl.items() if not math.isfinite(kl)]
            raise NonFiniteError(f"round {index + 1}: the loss is {losses.loss} (tasks {', '.join(bad)})")
        with self._phase("step"):
            grad_norm = self._student.step()
            if not math.isfinite(grad_norm) and self._config.precision != "fp16":  # fp16: the scaler skips the step
                raise NonFiniteError(f"round {index + 1}: the gradient norm is {grad_norm} at loss {losses.loss:g}")
            if self._ema is not None:
                self._ema.update()
        return losses, grad_norm

    # ---- shared by the stages ----

    def _guidance(self, task: str) -> float:
        own = self._config.tasks[task].guidance
        return self._config.rollout.guidance if own is None else own

    def _velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        self._group.progress(self._doing)
        return guided_velocity(self._family, network, x, sigma, cond, self._uncond, guidance)

    def _rollout(self, predict: Any, noise: SampleNoise, states_dtype: torch.dtype | None = None) -> Trajectory:
        size, device = self._config.rollout.micro_batch, self._group.device
        return rollout(
            predict, noise, self._kernel, self._sigmas, micro_batch=size, device=device, states_dtype=states_dtype
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._doing = f"round {self._round}, {name}"
        self._group.progress(self._doing)
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
