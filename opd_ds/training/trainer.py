"""The round: prompts, rollout, what is known of the visited states, accumulated loss over all tasks, one step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.data import PromptSet, Shard, draw_prompts, shard
from opd_ds.diffusion import Coefficients, kernel
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Keep, MicroBatch, Rows, Trajectory, rollout
from opd_ds.engine import Group, ShardedEma, ShardReader, StudentEngine
from opd_ds.errors import NonFiniteError
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.models import Conditioning, GuidedVelocity, ModelFamily, guide
from opd_ds.training.accumulator import Loss, LossTerm, RoundAccumulator, RoundLosses
from opd_ds.training.auto_batch import AutoMicroBatch
from opd_ds.training.buffer import Columns, Pairs, PerPair, TrajectoryBuffer
from opd_ds.training.encoding import Asked, encode_batches
from opd_ds.training.meter import RoundMeter
from opd_ds.training.stages import StagePairs, stage_counts
from opd_ds.training.steps import choose_steps
from opd_ds.training.teachers import TeacherPool
from opd_ds.utils.transfer import to_device

Known = TypeVar("Known")


class Saved(Protocol):
    """What belongs to a run's state beside the student.

    Attributes:
        kind: its name in checkpoints.
    """

    kind: str

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part, as entries of `opd_ds.engine.state`."""
        ...

    def scalar_state(self) -> dict[str, Any]:
        """What is equal on all ranks, fit for JSON."""
        ...

    def load_state_dict(self, shards: ShardReader, scalars: dict[str, Any]) -> None:
        """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it. Collective."""
        ...


@dataclass(frozen=True)
class Components:
    """What a trainer is built from."""

    config: Any  # the run config of the algorithm's kind, `DistilConfig` or `TeachConfig`
    group: Group
    family: ModelFamily
    student: StudentEngine
    ema: ShardedEma | None
    prompts: dict[str, PromptSet]
    teachers: TeacherPool
    rewards: RewardPool


@dataclass(frozen=True)
class TaskBatch:
    """One task's samples of a round on this rank: prompts and noise.

    Attributes:
        trained: int64 [N, K] on the host, the trained steps of the samples of all ranks, ascending.
        updates: optimizer steps that share the samples between them.
    """

    part: Shard
    prompts: list[str]
    metadata: list[dict[str, Any]]
    cond: Conditioning
    noise: SampleNoise
    trained: Tensor
    updates: int

    @property
    def chosen(self) -> Tensor:
        """The trained steps of this rank's samples: int64 [B, K]."""
        return self.trained[self.part.indices]

    def last_steps(self, world: int) -> list[list[int]]:
        """The last trained step of each sample, by rank."""
        last = self.trained[:, -1]
        ranks = (shard(self.part.total, rank, world, self.updates) for rank in range(world))
        return [last[part.indices].tolist() for part in ranks]

    def stage_counts(self, stages: tuple[int, ...], world: int) -> tuple[tuple[int, ...], ...]:
        """For each optimizer step, how many pairs each of two networks has on the rank with most of them."""
        ranks = [shard(self.part.total, rank, world, self.updates).indices for rank in range(world)]
        own = len(self.part) // self.updates
        shares = [[self.trained[rows[k * own : (k + 1) * own]] for rows in ranks] for k in range(self.updates)]
        return tuple(stage_counts(share, stages) for share in shares)

    @property
    def pairs(self) -> int:
        """(sample, step) pairs of an optimizer step, over all ranks."""
        return self.part.total // self.updates * self.trained.shape[1]


@dataclass(frozen=True)
class TrainingData(Generic[Known]):
    """One task's pairs, ready for training.

    Attributes:
        known: what the loss knows of them.
        pairs: how many count in the mean, over all ranks, in each optimizer step.
    """

    buffer: TrajectoryBuffer
    known: Columns[Known]
    pairs: Sequence[float]


@dataclass(frozen=True)
class Experience(Generic[Known]):
    """What a round has seen before it trains, by task.

    Attributes:
        batches: what was drawn for it.
        final: clean latents float32 [B, C, ...] of the rollouts, on the device; empty where nobody looks at them.
        scores: what rewards said of them, where they are learned from.
    """

    batches: dict[str, TaskBatch]
    data: dict[str, TrainingData[Known]]
    final: dict[str, Tensor]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What a round did: losses and gradient norm of its last step, and what it trained on."""

    batches: dict[str, TaskBatch]
    losses: RoundLosses
    grad_norm: float
    final: dict[str, Tensor]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutResult:
    """Where one task's trajectories of a round ended on this rank: `final` float32 [B, C, ...], on the device."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    final: Tensor


@dataclass(frozen=True)
class RoundReport:
    """What a round measured, equal on all ranks but for `seconds` (this rank's, per phase) and `rolled`.

    Attributes:
        passes: of the network over one latent, all ranks together: `forward` (a guided velocity is two) and `backward`;
            samples that pad a rank's part are passed as well.
        rolled: by task; empty where nobody looks at the images (`RunConfig.shows_rollouts`), as they are not finished.
        scores: what rewards said of the rollouts, where they are learned from.
        skipped_steps: of this round, because a gradient overflowed in fp16; None in precisions that skip none.
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
    skipped_steps: int | None


class Trainer(ABC):
    """Runs rounds. All randomness is named by (seed, round, task, sample index), so there is no such state to save."""

    loss: Loss[Any]

    def __init__(self, parts: Components) -> None:
        config: RunConfig = parts.config
        self._settings, self._group, self._family = config, parts.group, parts.family
        self._student, self._ema, self._prompts = parts.student, parts.ema, parts.prompts
        self._sigmas = parts.family.sigmas(config.rollout.steps)
        self._stages = parts.family.stages(self._sigmas[:-1])
        self._device_sigmas = to_device(self._sigmas.float(), parts.group.device)
        self._coefficients = kernel(config.rollout.kernel, config.rollout.noise_level).coefficients(self._sigmas)
        self._uncond = parts.family.encode([parts.family.negative_prompt])
        found = config.scoring.micro_batch == "auto" and parts.group.device.type != "cpu"
        size = None if found else config.scoring_micro_batch
        self._scoring = AutoMicroBatch("scoring.micro_batch = auto", size, shrinks=found)

    @classmethod
    def check(cls, config: Any, family: ModelFamily) -> None:
        """Raise UserError for settings that this trainer cannot run with; before networks load."""
        kernel(config.rollout.kernel, config.rollout.noise_level).coefficients(family.sigmas(config.rollout.steps))

    @property
    def saved(self) -> Sequence[Saved]:
        """What belongs to the run's state beside the student."""
        return [self._ema] if self._ema is not None else []

    def run_round(self, index: int) -> RoundReport:
        """Round `index`, counted from 0. Collective.

        Raises:
            NonFiniteError: the loss is not finite (raised before the step), or the gradient norm is not.
        """
        meter = RoundMeter(self._group, index + 1)
        skipped = self._student.skipped_steps
        learned = self._learn(index, meter)
        rolled = {
            task: RolloutResult(learned.batches[task].prompts, learned.batches[task].metadata, final)
            for task, final in learned.final.items()
        }
        return RoundReport(
            round=index + 1,
            losses=learned.losses,
            grad_norm=learned.grad_norm,
            learning_rate=self._student.learning_rate,
            samples=sum(batch.part.total for batch in learned.batches.values()),
            seconds=meter.seconds(),
            passes=meter.passes(),
            rolled=rolled,
            scores=learned.scores,
            skipped_steps=self._student.skipped_steps - skipped if self._settings.precision == "fp16" else None,
        )

    @abstractmethod
    def _learn(self, index: int, meter: RoundMeter) -> Learned:
        """Prompts to optimizer step."""

    # ---- the stages, in order ----

    def _draw(self, index: int) -> dict[str, TaskBatch]:
        """The round's prompts, encoded, with their noise and their trained steps, by task."""
        settings, world, group = self._settings, self._group.world, self._settings.group_size
        seed, updates = settings.run.seed, settings.train.updates_per_round
        parts = {
            task: shard(settings.samples(task), world.rank, world.size, updates) for task in settings.tasks_of(index)
        }
        drawn = {}
        for task, part in parts.items():
            visits = settings.visits(index, task)
            rows = draw_prompts(len(self._prompts[task]), part.total // group, seed, visits, task)
            drawn[task] = [rows[i // group] for i in part.indices]
        prompts = {task: [self._prompts[task].prompts[row] for row in rows] for task, rows in drawn.items()}
        asked = {
            task: Asked(prompts[task], [self._prompts[task].pictures_of(row) for row in drawn[task]], part.indices)
            for task, part in parts.items()
        }
        conds = encode_batches(self._family, self._group, asked)
        return {
            task: TaskBatch(
                part,
                prompts[task],
                [self._prompts[task].metadata[row] for row in drawn[task]],
                conds[task],
                SampleNoise([sample_seed(seed, index, task, i) for i in part.indices], self._family.latent_shape),
                self._choose(index, task, list(range(part.total))),
                updates,
            )
            for task, part in parts.items()
        }

    def _choose(self, index: int, task: str, samples: list[int]) -> Tensor:
        """The trained steps of `samples`: int64 [B, K]."""
        settings = self._settings.rollout
        return choose_steps(settings.trained_steps, settings.steps, self._settings.run.seed, index, task, samples)

    @torch.no_grad()
    def _roll_out(
        self,
        network: Any,
        cond: Conditioning,
        noise: SampleNoise,
        guidance: float,
        meter: RoundMeter,
        *,
        parts: Sequence[MicroBatch] | None = None,
        keep: Keep | None = None,
        coefficients: Coefficients | None = None,
    ) -> Trajectory:
        """A network's trajectories.

        Args:
            parts, keep: as `rollout` takes them.
            coefficients: of another sampler than the run's.
        """

        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            own = cond.select(rows.device, rows.host)
            return self._velocity(network, x, sigma, own, guidance, meter, self._stages[step])

        table = self._coefficients if coefficients is None else coefficients
        return rollout(predict, noise, table, self._sigmas, parts, device=self._group.device, keep=keep)

    def _query_frozen(self, network: Any, buffer: TrajectoryBuffer, guidance: float, meter: RoundMeter) -> PerPair:
        """A frozen network's velocities at the chosen pairs."""

        def say(x: Tensor, sigma: Tensor, cond: Conditioning, stage: int) -> Tensor:
            return self._velocity(network, x, sigma, cond, guidance, meter, stage)

        return PerPair(self._ask(buffer, say))

    @torch.no_grad()
    def _ask(self, buffer: TrajectoryBuffer, say: Callable[[Tensor, Tensor, Conditioning, int], Tensor]) -> Tensor:
        """What `say` makes of all chosen pairs; its last argument is their stage."""

        def query(pairs: Pairs) -> Tensor:
            return say(*buffer.inputs(pairs, self._device_sigmas), pairs.stage)

        def query_part(part: StagePairs, rows: slice) -> Tensor:
            return query(buffer.pairs_of(part, rows))

        if not buffer.stage_counts:
            return torch.cat(self._scoring.run(buffer.pair_count, lambda rows: query(buffer.pairs(rows))))
        said: list[Tensor] = []
        parts = [part for update in range(len(buffer.stage_counts)) for part in buffer.by_stage(update)]
        for part in parts:
            said += self._scoring.run(len(part), partial(query_part, part))
        places, counts = (torch.cat([getattr(part, key) for part in parts]) for key in ("index", "counts"))
        own = torch.cat(said)[to_device(counts.nonzero().flatten(), self._group.device)]
        return torch.empty_like(own).index_copy_(0, to_device(places[counts], self._group.device), own)

    def _train(self, data: Mapping[str, TrainingData[Any]], update: int, meter: RoundMeter) -> RoundLosses:
        """Forward and backward of the pairs of all tasks, those of one of the round's updates."""
        size, updates = self._settings.train.micro_batch, self._settings.train.updates_per_round
        with meter.phase("train"):
            batches = {task: one.buffer.micro_batches(size, update, updates) for task, one in data.items()}
            accumulator = self._accumulator(list(data), sum(map(len, batches.values())))
            for task, one in data.items():
                for pairs in batches[task]:
                    states, sigma, cond = one.buffer.inputs(pairs, self._device_sigmas)
                    guidance = self._settings.student_guidance(task)
                    predicted = self._predict(self._student, states, sigma, cond, guidance, meter, pairs.stage)
                    losses, measured = self._losses(predicted, pairs.step, one.known.at(pairs))
                    weights = one.buffer.weights_of(pairs)
                    accumulator.add(LossTerm(task, losses, measured, pairs.step, weights, one.pairs[update]))
            return accumulator.measure()

    def _losses(self, predicted: GuidedVelocity, steps: Tensor, known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`self.loss` of a micro-batch."""
        return self.loss(predicted.velocity, steps, known)

    def _accumulator(self, tasks: list[str], micro_batches: int) -> RoundAccumulator:
        weights = {task: self._settings.tasks[task].weight for task in tasks}
        steps = self._settings.rollout.steps
        return RoundAccumulator(self._student, self._group, weights, self.loss.measures, steps, micro_batches)

    def _step(self, losses: RoundLosses, meter: RoundMeter) -> float:
        """One optimizer step on what was accumulated, unless that is not finite; EMA. Returns the gradient norm."""
        if not math.isfinite(losses.loss):
            bad = [task for task, means in losses.means.items() if not all(map(math.isfinite, means.values()))]
            where = f" (tasks {', '.join(bad)})" if bad else ""
            raise NonFiniteError(f"round {meter.round_number}: the loss is {losses.loss}{where}")
        with meter.phase("step"):
            grad_norm = self._student.step()
            if not math.isfinite(grad_norm) and self._settings.precision != "fp16":  # fp16: the scaler skips the step
                raise NonFiniteError(
                    f"round {meter.round_number}: the gradient norm is {grad_norm} at loss {losses.loss:g}"
                )
            if self._ema is not None:
                self._ema.update()
        return grad_norm

    # ---- shared by the stages ----

    def _buffer(self, states: Tensor | None, batch: TaskBatch) -> TrajectoryBuffer:
        """`states` [B, K, C, ...] of the batch's trained steps, which were kept."""
        assert states is not None
        buffer = TrajectoryBuffer(states, batch.chosen, batch.part.weights, batch.cond)
        if len(set(self._stages)) == 1:
            return buffer
        counts = batch.stage_counts(self._stages, self._group.world.size)
        return replace(buffer, stages=self._stages, stage_counts=counts)

    def _velocity(
        self,
        network: Any,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float,
        meter: RoundMeter,
        stage: int,
    ) -> Tensor:
        return self._predict(network, x, sigma, cond, guidance, meter, stage).velocity

    def _predict(
        self,
        network: Any,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float,
        meter: RoundMeter,
        stage: int,
    ) -> GuidedVelocity:
        meter.heartbeat()
        uncond = self._uncond if cond.negative is None else cond.negative
        predicted = guide(self._family, network, x, sigma, cond, uncond, guidance, stage)
        meter.count(len(x) * self._family.passes(guidance), backward=predicted.velocity.requires_grad)
        return predicted


class BufferedTrainer(Trainer):
    """A round that first sees, then trains on what it has seen."""

    def _learn(self, index: int, meter: RoundMeter) -> Learned:
        seen = self._see(index, meter)
        updates = range(self._settings.train.updates_per_round)
        for update in [*updates] * self._settings.train.inner_epochs:
            losses = self._train(seen.data, update, meter)
            grad_norm = self._step(losses, meter)
        self._after_steps(index)
        return Learned(seen.batches, losses, grad_norm, seen.final, seen.scores)

    def _see(self, index: int, meter: RoundMeter) -> Experience[Any]:
        """What round `index` trains on."""
        with meter.phase("encode"):
            batches = self._draw(index)
        return self._collect(index, batches, meter)

    @abstractmethod
    def _collect(self, index: int, batches: dict[str, TaskBatch], meter: RoundMeter) -> Experience[Any]:
        """Rollouts, and what frozen networks and rewards say of them."""

    def _after_steps(self, index: int) -> None:
        """What follows the trained weights, once a round."""
