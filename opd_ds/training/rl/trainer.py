"""A round of reinforcement learning: rollouts, rewards beside them, advantages, accumulated loss, step, old policy."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from opd_ds.config.rl import GuardSection, NftSection, TeachConfig
from opd_ds.data import PromptSet
from opd_ds.diffusion import Coefficients, kernel
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.diffusion.rollout import Trajectory, chunks
from opd_ds.engine import OLD_POLICY, START, Group, ShardedEma, StudentEngine, WeightSnapshot
from opd_ds.errors import UserError
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.rewards import Reward
from opd_ds.training.accumulator import RoundLosses
from opd_ds.training.buffer import TrajectoryBuffer, noised_states
from opd_ds.training.rl.advantages import group_advantages, optimality
from opd_ds.training.rl.grpo_guard import GrpoGuardLoss
from opd_ds.training.rl.nft import NftLoss
from opd_ds.training.rl.reward_worker import Judge
from opd_ds.training.trainer import TaskBatch, Trainer


class RLTrainer(Trainer):
    """Rounds of DiffusionNFT or GRPO-Guard.

    The old policy and the start, where they are needed, are copies of the trained weights (`WeightSnapshot`) that take
    their place in the network for rollouts and scoring: one network, any ZeRO stage, LoRA or full.
    """

    def __init__(
        self,
        config: TeachConfig,
        group: Group,
        family: ModelFamily,
        student: StudentEngine,
        ema: ShardedEma | None,
        prompts: dict[str, PromptSet],
        rewards: dict[str, Reward],
    ) -> None:
        super().__init__(config, group, family, student, ema, prompts)
        self._config, self._teach = config, config.teach
        self.group_size = config.teach.group
        self._judge = Judge(rewards, family.decode, config.teach.reward_attempts)
        self._turns = [name for name, task in config.tasks.items() for _ in range(task.turns)]
        self._stochastic = self._coefficients
        self._start = WeightSnapshot(student, START) if config.teach.kl else None
        self._old: WeightSnapshot | None = None
        if isinstance(config.teach, NftSection):
            self._old = WeightSnapshot(student, OLD_POLICY)
            self._loss: NftLoss | GrpoGuardLoss = NftLoss(config.teach, self._sigmas, group.device)
        else:
            self._refuse_steps_without_noise()
            self._loss = GrpoGuardLoss(config.teach, self._coefficients, self._sigmas, group.device)
        self.measures = self._loss.measures

    @property
    def snapshots(self) -> list[WeightSnapshot]:
        return [*super().snapshots, *(copy for copy in (self._old, self._start) if copy is not None)]

    def _learn(
        self, index: int, draws: dict[str, TaskBatch], conds: dict[str, Conditioning]
    ) -> tuple[RoundLosses, float]:
        self._coefficients = self._table(index)
        buffers, pending = {}, {}
        with self._behaviour(), self._student.gathered() as policy:
            with self._phase("rollout"):
                for task, draw in draws.items():
                    rolled, pending[task] = self._roll_out_and_judge(policy, task, draw, conds[task])
                    self._final[task] = rolled.final
                    buffers[task] = self._buffer(index, task, draw, conds[task], rolled)
            if self._old is not None:
                with self._phase("score"):
                    self._ask("old", policy, buffers)
        if self._start is not None:
            with self._phase("score"), self._start.swapped_in(), self._student.gathered() as start:
                self._ask("start", start, buffers)
        with self._phase("rewards"):
            pairs = {task: self._weigh(task, draws[task], buffers[task], pending[task]) for task in draws}
        for _ in range(self._config.train.inner_epochs):
            losses, grad_norm = self._optimize(lambda: self._train(buffers, pairs, self._loss))
        self._follow(index)
        return losses, grad_norm

    # ---- the stages, in order ----

    def _tasks(self, index: int) -> list[str]:
        if self._teach.schedule == "together":
            return super()._tasks(index)
        return [self._turns[index % len(self._turns)]]

    def _visit(self, index: int, task: str) -> int:
        if self._teach.schedule == "together":
            return index
        cycles, place = divmod(index, len(self._turns))
        return cycles * self._turns.count(task) + self._turns[:place].count(task)

    def _behaviour(self) -> AbstractContextManager[None]:
        """Inside, the network is the policy that draws."""
        return nullcontext() if self._old is None else self._old.swapped_in()

    def _roll_out_and_judge(
        self, policy: Any, task: str, draw: TaskBatch, cond: Conditioning
    ) -> tuple[Trajectory, list[Future[Tensor]]]:
        parts, pending = [], []
        asked = self._config.tasks[task].rewards
        for rows in chunks(len(draw.part), self._config.rollout.micro_batch):
            noise, guidance = draw.noise[rows], self._guidance(task)
            part = self._roll_out(policy, cond[rows], noise, guidance, transitions=self._old is None)
            parts.append(part if self._old is None else Trajectory(part.final))
            pending.append(self._judge.submit(asked, part.final, draw.prompts[rows], draw.metadata[rows]))
        return Trajectory.cat(parts), pending

    def _buffer(
        self, index: int, task: str, draw: TaskBatch, cond: Conditioning, rolled: Trajectory
    ) -> TrajectoryBuffer:
        """What is trained on: the transitions as they were drawn, or (NFT) the pictures, noised afresh."""
        if self._old is None:
            kept = {"velocity": rolled.velocity, "noise": rolled.noise}
        else:
            seeds = [sample_seed(self._config.run.seed, index, f"{task}/noised", i) for i in draw.part.indices]
            noise = SampleNoise(seeds, self._family.latent_shape)
            rolled = noised_states(rolled.final, noise, self._sigmas, self._family.dtype)
            kept = {"flow": rolled.velocity}
        assert rolled.states is not None
        known = {name: values for name, values in kept.items() if values is not None}
        return TrajectoryBuffer(rolled.states, draw.chosen, draw.part.weights, cond, known)

    def _ask(self, name: str, network: Any, buffers: dict[str, TrajectoryBuffer]) -> None:
        for task, buffer in buffers.items():
            self._query_frozen(name, network, buffer, self._guidance(task))

    def _weigh(self, task: str, draw: TaskBatch, buffer: TrajectoryBuffer, pending: list[Future[Tensor]]) -> float:
        """Rewards of all ranks to what each sample is worth; returns how many pairs count. Collective.

        Raises:
            UserError: not one picture of the round could be judged.
        """
        asked = self._config.tasks[task].rewards
        mine = Judge.collect(pending, lambda: self._group.progress(f"{self._doing}, waiting for the rewards of {task}"))
        scores = torch.full((draw.part.total, len(asked)), torch.nan, dtype=torch.float64)
        # A sample that only fills up a rank's share is another rank's too, and counts there.
        own = draw.part.weights > 0
        indices = torch.tensor(draw.part.indices)
        for places, values in self._group.gather((indices[own], mine[own])):
            scores[places] = values
        rewards = scores @ torch.tensor([reward.weight for reward in asked], dtype=torch.float64)
        judged = torch.isfinite(rewards)
        if not judged.any():
            raise UserError(
                f"round {self._round}: the rewards of task {task} judged none of its {len(rewards)} pictures in "
                f"{self._teach.reward_attempts} attempts (see the log above); the last checkpoint is intact, go on "
                "with --resume auto when they work again"
            )
        self._report(task, scores, rewards)
        advantages = group_advantages(rewards, self._teach.group, self._teach.advantage_std)
        clip = self._teach.advantage_clip
        if isinstance(self._teach, NftSection):
            worth = {"optimality": optimality(advantages, clip, self._teach.optimality)}
        else:
            worth = {"advantage": advantages.clamp(-clip, clip)}
        buffer.per_sample = {
            name: values[indices].to(self._group.device, torch.float32) for name, values in worth.items()
        }
        buffer.weights = draw.part.weights * judged[indices]
        return float(judged.sum()) * draw.chosen.shape[1]

    def _report(self, task: str, scores: Tensor, rewards: Tensor) -> None:
        good = rewards[torch.isfinite(rewards)]
        self._scores |= {
            f"{task}/mean": float(good.mean()),
            f"{task}/std": float(good.std(correction=0)),
            f"{task}/left_out": float(len(rewards) - len(good)),
        }
        for reward, column in zip(self._config.tasks[task].rewards, scores.T, strict=True):
            self._scores[f"{task}/{reward.label}"] = float(column.nanmean())

    def _follow(self, index: int) -> None:
        """The old policy moves towards the trained one."""
        if self._old is None or not isinstance(self._teach, NftSection):
            return
        settings, steps = self._teach.old_policy, (index + 1) * self._config.train.inner_epochs
        self._old.follow(min(settings.rate * max(0, steps - settings.start), settings.maximum))

    # ---- the steps that draw noise ----

    def _window(self, index: int) -> range | None:
        """The round's stochastic steps; None: all of them."""
        length = None if isinstance(self._teach, NftSection) else self._teach.window
        if length is None:
            return None
        noisy = (self._stochastic.std > 0).tolist()
        starts = [first for first in range(len(noisy) - length + 1) if all(noisy[first : first + length])]
        generator = torch.Generator().manual_seed(sample_seed(self._config.run.seed, index, "window", 0))
        first = starts[int(torch.randint(len(starts), (), generator=generator))]
        return range(first, first + length)

    def _table(self, index: int) -> Coefficients:
        window = self._window(index)
        if window is None:
            return self._stochastic
        inside = torch.zeros(self._config.rollout.steps, dtype=torch.bool)
        inside[window.start : window.stop] = True
        return self._stochastic.where(inside, kernel("euler").coefficients(self._sigmas))

    def _choose(self, index: int, task: str, samples: list[int]) -> Tensor:
        window = self._window(index)
        if window is None:
            return super()._choose(index, task, samples)
        return torch.arange(window.start, window.stop).expand(len(samples), -1)

    def _refuse_steps_without_noise(self) -> None:
        """A step that draws nothing has no likelihood to learn from."""
        settings = self._config.rollout
        still = {step for step, std in enumerate(self._stochastic.std.tolist()) if std == 0}
        if self._config.trained_steps > settings.steps - len(still):
            raise UserError(
                f"rollout.kernel = {settings.kernel!r} draws noise on {settings.steps - len(still)} of its "
                f"{settings.steps} steps, fewer than are to be trained ({self._config.trained_steps})"
            )
        if isinstance(self._teach, GuardSection) and self._teach.window is not None:
            return
        if settings.trained_steps.queries is not None:
            trained = set(range(settings.steps))
        else:
            trained = set(self._choose(0, "", [0])[0].tolist())
        if still & trained:
            raise UserError(
                f"rollout.kernel = {settings.kernel!r} draws no noise on step {min(still & trained)}, which "
                "rollout.trained_steps trains; give the others, as in trained_steps: {fraction: 0.99}"
            )
