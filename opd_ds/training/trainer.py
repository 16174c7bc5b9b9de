"""The round: prompts, rollout, what is known of the visited states, accumulated loss over all tasks, one step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.data import Kind, PromptSet, Shard, Size, Sizes, draw_prompts, negative_prompt, shards_by
from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Keep, MicroBatch, Rows, Trajectory, chunks, rollout
from opd_ds.engine import Group, ShardedEma, ShardReader, StudentEngine
from opd_ds.errors import NonFiniteError
from opd_ds.evaluation.reward_pool import RewardPool
from opd_ds.models import Conditioning, GuidedVelocity, ModelFamily, guide
from opd_ds.training.accumulator import Loss, LossTerm, RoundAccumulator, RoundLosses
from opd_ds.training.auto_batch import AutoMicroBatch
from opd_ds.training.buffer import Columns, NoisedStates, Pairs, PerPair, TrajectoryBuffer, noised_states
from opd_ds.training.encoding import Asked, encode_batches
from opd_ds.training.kept_directions import KeptDirections
from opd_ds.training.meter import PassCounter, RoundMeter
from opd_ds.training.remote_teachers import RemoteTeachers
from opd_ds.training.shares import Sampler, Share, TaskBatch, by_task
from opd_ds.training.stages import StagePairs
from opd_ds.training.steps import choose_steps
from opd_ds.training.teachers import TeacherPool
from opd_ds.utils.pictures import Picture
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
    teachers: TeacherPool | RemoteTeachers
    rewards: RewardPool


@dataclass(frozen=True)
class TrainingData(Generic[Known]):
    """A share's pairs, ready for training.

    Attributes:
        known: what the loss knows of them.
        pairs: how many of the task count in the mean of this optimizer step: of all sizes, over all ranks.
    """

    buffer: TrajectoryBuffer
    known: Columns[Known]
    pairs: float


@dataclass(frozen=True)
class Experience(Generic[Known]):
    """What a round has seen before it trains.

    Attributes:
        batches: what was drawn for it.
        final: clean latents float32 [B, C, ...] of the rollouts, on the device; empty where nobody looks at them.
        scores: what rewards said of them, where they are learned from.
    """

    batches: dict[Share, TaskBatch]
    data: dict[Share, TrainingData[Known]]
    final: dict[Share, Tensor]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What a round did: losses and gradient norm of its last step, and what it trained on."""

    batches: dict[Share, TaskBatch]
    losses: RoundLosses
    grad_norm: float
    final: dict[Share, Tensor]
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutResult:
    """Where one task's trajectories of a round ended on this rank: of each sample float32 [C, ...], on the device."""

    prompts: list[str]
    metadata: list[dict[str, Any]]
    pictures: list[tuple[Picture, ...]]
    final: list[Tensor]

    @classmethod
    def by_task(cls, batches: dict[Share, TaskBatch], final: dict[Share, Tensor]) -> dict[str, RolloutResult]:
        """Of the tasks in `final`, the samples of all sizes in their order."""
        found = {}
        for task, shares in by_task(final).items():
            places = [(index, share, row) for share in shares for row, index in enumerate(batches[share].part.indices)]
            rows = [(share, row) for _, share, row in sorted(places, key=lambda place: place[0])]
            found[task] = cls(
                [batches[share].prompts[row] for share, row in rows],
                [batches[share].metadata[row] for share, row in rows],
                [batches[share].pictures[row] for share, row in rows],
                [final[share][row] for share, row in rows],
            )
        return found


@dataclass(frozen=True)
class RoundReport:
    """What a round measured, equal on all ranks but for `seconds` (this rank's, per phase) and `rolled`.

    Attributes:
        passes: of the network over one latent, all ranks together: `forward` (a guided velocity is two) and `backward`;
            samples that pad a rank's part are passed as well.
        passes_by_part: the forward ones: `rollout`, `score` (frozen networks) and `train`, and with `_negative` behind
            it those of a part that were made with the negative prompt, which is what guidance costs.
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
    passes_by_part: dict[str, int]
    rolled: dict[str, RolloutResult]
    scores: dict[str, float]
    skipped_steps: int | None


class Trainer(ABC):
    """Runs rounds. All randomness is named by (seed, round, task, sample index), so there is no such state to save.

    Attributes:
        losses: of each image size; they measure the same.
    """

    losses: Mapping[Size, Loss[Any]]

    def __init__(self, parts: Components) -> None:
        config: RunConfig = parts.config
        self._settings, self._group, self._family = config, parts.group, parts.family
        self._student, self._ema, self._prompts = parts.student, parts.ema, parts.prompts
        self._sizes = Sizes(config.model, parts.family)
        sizes = self._sizes.possible(parts.prompts.values())
        self._samplers = {size: Sampler.of(config, self._sizes.family(size), parts.group.device) for size in sizes}
        self._own_negatives = any(prompts.own_negatives for prompts in parts.prompts.values())
        self._uncond = parts.family.encode([parts.family.negative_prompt])
        self._scoring = AutoMicroBatch.scoring(config, parts.group.device)

    @classmethod
    def check(cls, config: Any, family: ModelFamily) -> None:
        """Raise UserError for settings that this trainer cannot run with at the family's size; before networks load."""
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
        rolled = RolloutResult.by_task(learned.batches, learned.final)
        passes, by_part = meter.passes()
        return RoundReport(
            round=index + 1,
            losses=learned.losses,
            grad_norm=learned.grad_norm,
            learning_rate=self._student.learning_rate,
            samples=sum(learned.batches[shares[0]].part.total for shares in by_task(learned.batches).values()),
            seconds=meter.seconds(),
            passes=passes,
            passes_by_part=by_part,
            rolled=rolled,
            scores=learned.scores,
            skipped_steps=self._student.skipped_steps - skipped if self._settings.precision == "fp16" else None,
        )

    @abstractmethod
    def _learn(self, index: int, meter: RoundMeter) -> Learned:
        """Prompts to optimizer step."""

    # ---- the stages, in order ----

    def _draw(self, index: int) -> dict[Share, TaskBatch]:
        """The round's prompts, encoded, with their noise and their trained steps."""
        seed, negative = self._settings.run.seed, self._family.negative_prompt
        rows: dict[Share, list[int]] = {}  # of the task's prompt set
        parts: dict[Share, list[Shard]] = {}
        rank, world = self._group.drawing.rank, self._group.drawing.size
        trained: dict[str, Tensor] = {}
        for task in self._settings.tasks_of(index):
            of_task, kinds = self._draw_rows(index, task)
            total, each = len(of_task), len(of_task) // self._settings.train.updates_per_round
            trained[task] = self._choose(index, task, list(range(total)))
            for update, samples in enumerate(chunks(total, each)):
                for of_ranks, shards in shards_by(range(total)[samples], kinds[samples], world, total).items():
                    share = Share(task, of_ranks, of_ranks[rank].size, update)
                    parts[share] = shards
                    rows[share] = [of_task[i] for i in shards[rank].indices]
        prompts = {share: [self._prompts[share.task].prompts[row] for row in own] for share, own in rows.items()}
        metadata = {share: [self._prompts[share.task].metadata[row] for row in own] for share, own in rows.items()}
        pictures = {share: [self._prompts[share.task].pictures_of(row) for row in own] for share, own in rows.items()}
        asked = {
            share: Asked(
                self._sizes.family(share.size),
                prompts[share],
                [negative_prompt(one, negative) for one in metadata[share]],
                pictures[share],
                shards[rank].indices,
            )
            for share, shards in parts.items()
        }
        conds = encode_batches(self._family, self._group, asked, own_negatives=self._own_negatives)
        return {
            share: TaskBatch(
                shards[rank],
                shards,
                prompts[share],
                metadata[share],
                pictures[share],
                conds[share],
                SampleNoise(
                    [sample_seed(seed, index, share.task, i) for i in shards[rank].indices],
                    self._samplers[share.size].latent_shape,
                ),
                trained[share.task],
                self._settings.train.updates_per_round,
            )
            for share, shards in parts.items()
        }

    def _draw_rows(self, index: int, task: str) -> tuple[list[int], list[Kind]]:
        """Of all the task's samples of round `index` their rows in its prompt set and their kinds, of which all samples
        of one prompt have the same.
        """
        settings, prompts = self._settings, self._prompts[task]
        samples, seed, group = settings.samples(task), settings.run.seed, settings.group_size
        drawn = draw_prompts(len(prompts), samples // group, seed, settings.visits(index, task), task)
        kinds = []
        for number, row in enumerate(drawn):
            pictures = prompts.pictures_of(row)
            kinds.append(
                self._sizes.kind(prompts.metadata[row], pictures, sample_seed(seed, index, f"{task}/size", number))
            )
        return [drawn[i // group] for i in range(samples)], [kinds[i // group] for i in range(samples)]

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
        sampler: Sampler,
        guidance: float,
        meter: RoundMeter,
        *,
        parts: Sequence[MicroBatch] | None = None,
        keep: Keep | None = None,
    ) -> Trajectory:
        """A network's trajectories; `parts`, `keep`: as `rollout` takes them."""

        every, counter = self._settings.rollout.negative_every, meter.part("rollout")
        kept = KeptDirections(every, len(noise)) if every > 1 and self._family.passes(guidance) > 1 else None

        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            own, stage = cond.select(rows.device, rows.host), sampler.stages[step]
            direction = None if kept is None else kept.at(step, rows)
            predicted = self._predict(network, x, sigma, own, guidance, counter, stage, direction)
            if kept is not None and direction is None:
                kept.put(rows, predicted)
            return predicted.velocity

        table, sigmas = sampler.coefficients, sampler.sigmas
        return rollout(predict, noise, table, sigmas, parts, device=self._group.device, keep=keep)

    def _query_frozen(self, network: Any, buffer: TrajectoryBuffer, guidance: float, meter: RoundMeter) -> PerPair:
        """A frozen network's velocities at the chosen pairs."""

        def say(x: Tensor, sigma: Tensor, cond: Conditioning, stage: int) -> Tensor:
            return self._predict(network, x, sigma, cond, guidance, meter.part("score"), stage).velocity

        return PerPair(self._ask(buffer, say))

    @torch.no_grad()
    def _ask(self, buffer: TrajectoryBuffer, say: Callable[[Tensor, Tensor, Conditioning, int], Tensor]) -> Tensor:
        """What `say` makes of all chosen pairs; its last argument is their stage."""

        def query(pairs: Pairs) -> Tensor:
            return say(*buffer.inputs(pairs), pairs.stage)

        def query_part(part: StagePairs, rows: slice) -> Tensor:
            return query(buffer.pairs_of(part, rows))

        if not buffer.stage_counts:
            return torch.cat(self._scoring.run(buffer.pair_count, lambda rows: query(buffer.pairs(rows))))
        said: list[Tensor] = []
        parts = buffer.by_stage()
        for part in parts:
            said += self._scoring.run(len(part), partial(query_part, part))
        places, counts = (torch.cat([getattr(part, key) for part in parts]) for key in ("index", "counts"))
        own = torch.cat(said)[to_device(counts.nonzero().flatten(), self._group.device)]
        return torch.empty_like(own).index_copy_(0, to_device(places[counts], self._group.device), own)

    def _train(self, data: Mapping[Share, TrainingData[Any]], update: int, meter: RoundMeter) -> RoundLosses:
        """Forward and backward of the pairs of all tasks, those of one of the round's updates."""
        size = self._settings.train.micro_batch
        with meter.phase("train"):
            batches = {share: one.buffer.micro_batches(size) for share, one in data.items() if share.update == update}
            accumulator = self._accumulator(batches, sum(map(len, batches.values())))
            for share, pairs in _in_turn(batches, data):
                one, guidance = data[share], self._settings.student_guidance(share.task)
                states, sigma, cond = one.buffer.inputs(pairs)
                counter = meter.part("train")
                predicted = self._predict(self._student, states, sigma, cond, guidance, counter, pairs.stage)
                losses, measured = self._losses(share.size, predicted, pairs.step, one.known.at(pairs))
                weights = one.buffer.weights_of(pairs)
                accumulator.add(LossTerm(share.task, losses, measured, pairs.step, weights, one.pairs))
            return accumulator.measure()

    def _losses(
        self, size: Size, predicted: GuidedVelocity, steps: Tensor, known: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`self.losses` of a micro-batch of one size."""
        return self.losses[size](predicted.velocity, steps, known)

    def _accumulator(self, shares: Iterable[Share], micro_batches: int) -> RoundAccumulator:
        weights = {task: self._settings.tasks[task].weight for task in by_task(shares)}
        measures, steps = next(iter(self.losses.values())).measures, self._settings.rollout.steps
        return RoundAccumulator(self._student, self._group, weights, measures, steps, micro_batches)

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

    def _noised(self, index: int, share: Share, final: Tensor, batch: TaskBatch) -> NoisedStates:
        """The batch's clean latents [B, C, ...], noised afresh to its trained steps."""
        sampler = self._samplers[share.size]
        seeds = [sample_seed(self._settings.run.seed, index, f"{share.task}/noised", i) for i in batch.part.indices]
        noise = SampleNoise(seeds, sampler.latent_shape)
        return noised_states(final, noise, sampler.sigmas, batch.chosen, self._family.dtype)

    def _buffer(self, share: Share, states: Tensor | None, batch: TaskBatch) -> TrajectoryBuffer:
        """`states` [B, K, C, ...] of the batch's trained steps, which were kept."""
        assert states is not None
        sampler = self._samplers[share.size]
        buffer = TrajectoryBuffer(states, batch.chosen, batch.part.weights, batch.cond, sampler.device_sigmas)
        if len(set(sampler.stages)) == 1:
            return buffer
        counts = batch.stage_counts(sampler.stages)
        return replace(buffer, stages=sampler.stages, stage_counts=counts)

    def _predict(
        self,
        network: Any,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: float,
        counter: PassCounter,
        stage: int,
        direction: Tensor | None = None,
    ) -> GuidedVelocity:
        """`direction`: as `guide` takes it."""
        counter.heartbeat()
        uncond = self._uncond if cond.negative is None else cond.negative
        predicted = guide(self._family, network, x, sigma, cond, uncond, guidance, stage, direction)
        negatives = len(x) * (self._family.passes(guidance) - 1) if direction is None else 0
        counter.count(len(x), negatives, backward=predicted.velocity.requires_grad)
        return predicted


def _in_turn(
    batches: Mapping[Share, Sequence[Pairs]], data: Mapping[Share, TrainingData[Any]]
) -> Iterator[tuple[Share, Pairs]]:
    """Share after share; where they are trained in the order in which their states were visited, those that were
    visited together by turns. The same on every rank.
    """
    if any(data[share].buffer.order is None for share in batches):
        yield from ((share, pairs) for share, parts in batches.items() for pairs in parts)
        return
    for together in zip_longest(*([(share, pairs) for pairs in parts] for share, parts in batches.items())):
        yield from (one for one in together if one is not None)


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
    def _collect(self, index: int, batches: dict[Share, TaskBatch], meter: RoundMeter) -> Experience[Any]:
        """Rollouts, and what frozen networks and rewards say of them."""

    def _after_steps(self, index: int) -> None:
        """What follows the trained weights, once a round."""
