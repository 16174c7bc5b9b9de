"""What the loops of others have in common, rewritten in plain torch and PEFT as baselines of the timing.

A peer differs from the next in the order of its work, in where its teachers are and in its batches. What is a mistake
of theirs and costs time is kept; what changes the objective is not: prompts, noise, guidances, losses and gradients are
those of our round (`tests/test_bench_speed.py`). One loop makes one optimizer step a round, over all tasks.

Weights are in float32 and the arithmetic is autocast to the run's precision. On several ranks DDP adds gradients up.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.paths import resolve_path
from opd_ds.data import PromptSet, draw_prompts, shard
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.engine import Group
from opd_ds.models import Conditioning
from opd_ds.training.networks import DTYPES, load_family, student_module

# Images of one task's rollout and their prompts; called in every round.
Scoring = Callable[[str, Tensor, list[str]], None]


@dataclass(frozen=True)
class Rollout:
    """Of one task: prompts, encoded, and the states that the student visited, the last one finished."""

    task: str
    prompts: list[str]
    cond: Conditioning
    states: list[Tensor]


class PeerLoop(ABC):
    """Rounds of somebody else's loop, on the prompts and the noise that our trainer would draw.

    A rank's trajectories of a task are one batch.

    Attributes:
        seconds: of the last round, by phase.
        passes: of the last round on this rank, by kind.
    """

    def __init__(self, config: DistilConfig, group: Group) -> None:
        self._config, self._group = config, group
        self.scoring: Scoring | None = None
        path = resolve_path(config.model.path, "model.path")
        self.family = load_family(config, path, group.device, torch.float32)
        self._prompts = {name: PromptSet.read(task.prompts, name) for name, task in config.tasks.items()}
        self._network = student_module(config.student, config.run.seed, self.family, None).to(group.device)
        for name, task in config.tasks.items():
            self._load_teacher(name, resolve_path(task.teacher.path, name))
        self._network.to(group.device)  # with the adapters that have come
        self._trained = [parameter for parameter in self._network.parameters() if parameter.requires_grad]
        alone = group.world.size == 1
        self._student: Any = self._network if alone else DistributedDataParallel(self._network)
        wanted = config.optimizer
        self._optimizer = AdamW(
            self._trained, wanted.lr, wanted.betas, eps=wanted.eps, weight_decay=wanted.weight_decay
        )
        self._average = [parameter.detach().clone() for parameter in self._trained]
        self._sigmas = self.family.sigmas(config.rollout.steps).tolist()
        self._negative = self.family.encode([self.family.negative_prompt])
        self.seconds: dict[str, float] = {}
        self.passes = {"forward": 0, "backward": 0}

    def run_round(self, index: int) -> float:
        """One round over all tasks and one optimizer step; this rank's part of the loss."""
        self.seconds, self.passes = {}, {"forward": 0, "backward": 0}
        total = self._accumulate(index)
        with self._phase("step"):
            self._step(index)
        return total

    @abstractmethod
    def _load_teacher(self, task: str, path: Path) -> None:
        """Before the optimizer is made."""

    @abstractmethod
    def _teacher(self, task: str) -> AbstractContextManager[nn.Module]:
        """The network that is the task's teacher."""

    @abstractmethod
    def _accumulate(self, index: int) -> float:
        """Rollouts, teachers and backward passes of a round."""

    def _rollout(self, index: int, task: str) -> Rollout:
        with self._phase("encode"):
            cond, noise, prompts = self._draw(index, task)
        with self._phase("rollout"), torch.no_grad():
            states = [noise]
            for step in range(self._config.rollout.steps):
                states.append(self._mean(self._network, states[-1], step, cond, self._config.rollout.guidance))
        if self.scoring is not None:
            with self._phase("rewards"):
                self.scoring(task, states[-1], prompts)
        return Rollout(task, prompts, cond, states)

    def _draw(self, index: int, task: str) -> tuple[Conditioning, Tensor, list[str]]:
        samples, seed, world = self._config.rollout.samples, self._config.run.seed, self._group.world
        part, known = shard(samples, world.rank, world.size), self._prompts[task]
        drawn = draw_prompts(len(known), samples, seed, index, task)
        prompts = [known.prompts[drawn[i]] for i in part.indices]
        noise = SampleNoise([sample_seed(seed, index, task, i) for i in part.indices], self.family.latent_shape)
        return self.family.encode(prompts), noise.draw(slice(None)).to(self._group.device), prompts

    @torch.no_grad()
    def _taught(self, teacher: nn.Module, rollout: Rollout, step: int) -> Tensor:
        """Where the teacher would go from a state."""
        guidance = self._config.tasks[rollout.task].teacher.guidance
        return self._mean(teacher, rollout.states[step], step, rollout.cond, guidance)

    def _learn(self, rollout: Rollout, step: int, target: Tensor) -> Tensor:
        """Forward and backward at a state; its part of the loss."""
        last = rollout.task == list(self._config.tasks)[-1] and step == self._config.trained_steps - 1
        with self._unless(last):
            mean = self._mean(self._student, rollout.states[step], step, rollout.cond, self._config.rollout.guidance)
            weight = self._config.tasks[rollout.task].weight / self._config.trained_steps
            loss = 0.5 * (mean - target).square().mean() * weight
            loss.backward()
        return loss.detach()

    def _step(self, index: int) -> None:
        nn.utils.clip_grad_norm_(self._trained, self._config.optimizer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if index % self._config.student.ema.every == 0:
            with torch.no_grad():
                for average, parameter in zip(self._average, self._trained, strict=True):
                    average.lerp_(parameter, 1 - self._config.student.ema.decay)

    def _mean(self, network: Any, state: Tensor, step: int, cond: Conditioning, guidance: float) -> Tensor:
        """Where an Euler step leads."""
        sigma = torch.full((len(state),), self._sigmas[step], device=state.device)
        dtype = DTYPES[self._config.precision]
        with torch.autocast(state.device.type, dtype=dtype, enabled=dtype != torch.float32):
            velocity = self.family.guided_velocity(network, state, sigma, cond, self._negative, guidance)
        passes = len(state) * self.family.passes(guidance)
        self.passes["forward"] += passes
        self.passes["backward"] += passes if velocity.requires_grad else 0
        return state + (self._sigmas[step + 1] - self._sigmas[step]) * velocity.float()

    def _unless(self, synchronise: bool) -> AbstractContextManager[Any]:
        """DDP adds gradients up over ranks with the last backward of a round only."""
        alone = self._group.world.size == 1
        return nullcontext() if synchronise or alone else self._student.no_sync()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
