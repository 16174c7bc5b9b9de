"""The round: prompts, rollout, what is known of the visited states, accumulated loss over all tasks, one step."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.data import PromptSet, Shard, draw_prompts, shard
from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Trajectory, rollout
from opd_ds.engine import Group, ShardedEma, StudentEngine, WeightSnapshot
from opd_ds.errors import NonFiniteError
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.training.accumulator import Loss, LossTerm, RoundAccumulator, RoundLosses
from opd_ds.training.auto_batch import AutoMicroBatch
from opd_ds.training.buffer import TrajectoryBuffer, choose_steps


@dataclass(frozen=True)
class RolloutResult:
    """Where one task's trajectories of a round ended on this rank: `final` [B, C, ...] float32, on the device."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    final: Tensor


@dataclass(frozen=True)
class RoundReport:
    """What a round measured, equal on all ranks but for `seconds` (this rank's, per phase) and `rolled`.

    Attributes:
        passes: of the network over one latent, all ranks together: `forward` (a guided velocity is two) and `backward`;
            samples that fill up a rank's share are passed as well.
        scores: what rewards said of the rollouts, where they are learned from.
    """

    round: int
    losses: RoundLosses
    grad_norm: float
    learning_rate: float
    samples: int
    seconds: dict[str, float]
    passes: dict[str, int]
    rolled: dict[str, RolloutResult]
    scores: dict[str, float]


@dataclass(frozen=True)
class TaskBatch:
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


class Trainer(ABC):
    """Runs rounds. All randomness is named by (seed, round, task, sample index), so there is no such state to save."""

    measures: Sequence[str]  # what the losses measure beside themselves
    group_size = 1  # pictures of one prompt

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        family: ModelFamily,
        student: StudentEngine,
        ema: ShardedEma | None,
        prompts: dict[str, PromptSet],
    ) -> None:
        self._settings, self._group, self._family = config, group, family
        self._student, self._ema, self._prompts = student, ema, prompts
        self._sigmas = family.sigmas(config.rollout.steps)
        self._coefficients = kernel(config.rollout.kernel, config.rollout.noise_level).coefficients(self._sigmas)
        self._uncond = family.encode([config.model.negative_prompt])
        self._task_weights = {name: task.weight for name, task in config.tasks.items()}
        found = config.scoring.micro_batch == "auto" and group.device.type != "cpu"
        size = None if found else config.scoring_micro_batch
        self._scoring = AutoMicroBatch("scoring.micro_batch = auto", size, shrinks=found)
        self._seconds: dict[str, float] = {}
        self._passes: dict[str, int] = {}
        self._final: dict[str, Tensor] = {}
        self._scores: dict[str, float] = {}
        self._round, self._doing = 0, ""

    @property
    def snapshots(self) -> list[WeightSnapshot]:
        """Further weights that belong to the run's state."""
        return [self._ema] if self._ema is not None else []

    def run_round(self, index: int) -> RoundReport:
        """Round `index`, counted from 0. Collective.

        Raises:
            NonFiniteError: the loss is not finite (raised before the step), or the gradient norm is not.
        """
        self._seconds, self._scores = {}, {}
        self._passes = {"forward": 0, "backward": 0}
        self._round = index + 1
        with self._phase("encode"):
            draws = {task: self._draw(index, task) for task in self._tasks(index)}
            conds = self._encode(draws)
        losses, grad_norm = self._learn(index, draws, conds)
        rolled = {task: RolloutResult(draw.prompts, draw.metadata, self._final[task]) for task, draw in draws.items()}
        return RoundReport(
            round=index + 1,
            losses=losses,
            grad_norm=grad_norm,
            learning_rate=self._student.learning_rate,
            samples=self._settings.rollout.samples * len(draws),
            seconds=dict(self._seconds),
            passes={kind: count * self._group.world.size for kind, count in self._passes.items()},
            rolled=rolled,
            scores=dict(self._scores),
        )

    @abstractmethod
    def _learn(
        self, index: int, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]
    ) -> tuple[RoundLosses, float]:
        """Rollout to optimizer step; the losses and gradient norm of the last step. Fills `_final`."""

    # ---- the stages, in order ----

    def _tasks(self, index: int) -> list[str]:
        """The tasks of round `index`."""
        return list(self._settings.tasks)

    def _visit(self, index: int, task: str) -> int:
        """Rounds on `task` before round `index`: its prompts are walked through without repetition."""
        return index

    def _draw(self, index: int, task: str) -> TaskBatch:
        samples, seed = self._settings.rollout.samples, self._settings.run.seed
        part = shard(samples, self._group.world.rank, self._group.world.size)
        known = self._prompts[task]
        drawn = draw_prompts(len(known), samples // self.group_size, seed, self._visit(index, task), task)
        rows = [drawn[i // self.group_size] for i in part.indices]
        noise = SampleNoise([sample_seed(seed, index, task, i) for i in part.indices], self._family.latent_shape)
        chosen = self._choose(index, task, part.indices)
        return TaskBatch(part, [known.prompts[i] for i in rows], [known.metadata[i] for i in rows], noise, chosen)

    def _choose(self, index: int, task: str, samples: list[int]) -> Tensor:
        """The trained steps of `samples`: int64 [B, K]."""
        settings = self._settings.rollout
        return choose_steps(settings.trained_steps, settings.steps, self._settings.run.seed, index, task, samples)

    def _encode(self, draws: dict[str, TaskBatch]) -> dict[str, Conditioning]:
        """All tasks' prompts in one pass, each once, so that encoders which are offloaded travel once a round."""
        places: dict[str, int] = {}
        for draw in draws.values():
            for prompt in draw.prompts:
                places.setdefault(prompt, len(places))
        everything = self._family.encode(list(places))
        return {
            task: everything[torch.tensor([places[prompt] for prompt in draw.prompts], device=self._group.device)]
            for task, draw in draws.items()
        }

    @torch.no_grad()
    def _roll_out(
        self, network: Any, cond: Conditioning, noise: SampleNoise, guidance: float, *, transitions: bool = False
    ) -> Trajectory:
        """A network's trajectories, states kept."""

        def predict(x: Tensor, sigma: Tensor, rows: slice, step: int) -> Tensor:
            return self._velocity(network, x, sigma, cond[rows], guidance)

        return self._rollout(predict, noise, keep=self._family.dtype, transitions=transitions)

    @torch.no_grad()
    def _query_frozen(self, name: str, network: Any, buffer: TrajectoryBuffer, guidance: float) -> None:
        """A frozen network's velocities at the chosen pairs, kept under `name`."""
        pairs = buffer.pairs

        def ask(rows: slice) -> Tensor:
            return self._velocity(network, *buffer.inputs(pairs[rows], self._sigmas), guidance)

        buffer.per_pair[name] = [*buffer.per_pair.get(name, []), *self._scoring.run(len(pairs), ask)]

    def _train(self, buffers: dict[str, TrajectoryBuffer], pairs: dict[str, float], loss: Loss) -> RoundAccumulator:
        """Forward and backward of all pairs of all tasks.

        Args:
            pairs: by task, how many pairs count, over all ranks.
        """
        size = self._settings.train.micro_batch
        accumulator = self._accumulator(list(buffers), sum(len(b.micro_batches(size)) for b in buffers.values()))
        for task, buffer in buffers.items():
            for batch, known in buffer.training_batches(size):
                states, sigma, cond = buffer.inputs(batch, self._sigmas)
                velocity = self._velocity(self._student, states, sigma, cond, self._guidance(task))
                losses, measured = loss(velocity, batch.step, known)
                weights = buffer.weights[batch.sample]
                accumulator.add(LossTerm(task, losses, measured, batch.step, weights, pairs[task]))
        return accumulator

    def _accumulator(self, tasks: list[str], micro_batches: int) -> RoundAccumulator:
        weights = {task: self._task_weights[task] for task in tasks}
        steps = self._settings.rollout.steps
        return RoundAccumulator(self._student, self._group, weights, self.measures, steps, micro_batches)

    def _optimize(self, train: Callable[[], RoundAccumulator]) -> tuple[RoundLosses, float]:
        """Accumulate, check, one optimizer step, EMA."""
        with self._phase("train"):
            losses = train().measure()
        if not math.isfinite(losses.loss):
            bad = [task for task, means in losses.means.items() if not all(map(math.isfinite, means.values()))]
            where = f" (tasks {', '.join(bad)})" if bad else ""
            raise NonFiniteError(f"round {self._round}: the loss is {losses.loss}{where}")
        with self._phase("step"):
            grad_norm = self._student.step()
            if not math.isfinite(grad_norm) and self._settings.precision != "fp16":  # fp16: the scaler skips the step
                raise NonFiniteError(f"round {self._round}: the gradient norm is {grad_norm} at loss {losses.loss:g}")
            if self._ema is not None:
                self._ema.update()
        return losses, grad_norm

    # ---- shared by the stages ----

    def _guidance(self, task: str) -> float:
        own = self._settings.tasks[task].guidance
        return self._settings.rollout.guidance if own is None else own

    def _velocity(self, network: Any, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        self._group.progress(self._doing)
        velocity = self._family.guided_velocity(network, x, sigma, cond, self._uncond, guidance)
        passes = len(x) * self._family.passes(guidance)
        self._passes["forward"] += passes
        self._passes["backward"] += passes if velocity.requires_grad else 0
        return velocity

    def _rollout(
        self, predict: Any, noise: SampleNoise, *, keep: torch.dtype | None = None, transitions: bool = False
    ) -> Trajectory:
        size, device = self._settings.rollout.micro_batch, self._group.device
        return rollout(
            predict,
            noise,
            self._coefficients,
            self._sigmas,
            micro_batch=size,
            device=device,
            keep=keep,
            transitions=transitions,
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._doing = f"round {self._round}, {name}"
        self._group.progress(self._doing)
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
