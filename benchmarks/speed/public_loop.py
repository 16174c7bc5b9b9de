"""What is run today: the loop of the public DiffusionOPD code, rewritten in plain torch as the baseline of the timing.

Task by task three separate passes: the student's rollout, its trajectory replayed by the task's teacher step by step,
and replayed once more by the student, step by step with a backward each; adapters switched in one network under DDP;
images scored in between, in every round, where that is asked for. What is a mistake there (the last step's teacher
velocity, computed and never used, is one) and costs time is kept, what changes the objective is not: loss and gradient
are those of our round (`tests/test_bench_speed.py`).

Full teachers, which the public code does not have, are what one would write first: networks of their own, moved to the
device before a task's replay and away after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.paths import resolve_path
from opd_ds.data import PromptSet, draw_prompts, shard
from opd_ds.diffusion.noise import SampleNoise, sample_seed
from opd_ds.engine import Group
from opd_ds.models import Conditioning, lora
from opd_ds.training.networks import DTYPES, load_family, student_module

# Images of one task's rollout and their prompts; called in every round.
Scoring = Callable[[str, Tensor, list[str]], None]


class PublicLoop:
    """Rounds of the public loop, on the prompts and the noise that our trainer would draw.

    Weights are in float32 and the arithmetic is autocast to the run's precision, as there.
    """

    def __init__(self, config: DistilConfig, group: Group) -> None:
        self._config, self._group = config, group
        self.scoring: Scoring | None = None
        path = resolve_path(config.model.path, "model.path")
        self.family = load_family(config, path, group.device, torch.float32)
        self._prompts = {name: PromptSet.read(task.prompts, name) for name, task in config.tasks.items()}
        self._network = student_module(config.student, config.run.seed, self.family, None).to(group.device)
        self._teachers: dict[str, nn.Module] = {}
        for name, task in config.tasks.items():
            self._load_teacher(name, resolve_path(task.teacher.path, name), task.teacher.placement)
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

    def _load_teacher(self, task: str, path: Path, placement: str) -> None:
        """A LoRA goes into the student's own network, beside its adapter."""
        if lora.is_adapter(path):
            lora.load_adapter(self._network, task, path, self.family.pipeline_class)
            lora.activate(self._network, STUDENT_ADAPTER, trainable=True)
            self._network.to(self._group.device)
            return
        teacher = self.family.load_transformer(path).requires_grad_(False).eval()
        self._teachers[task] = teacher.to(self._group.device) if placement == "resident" else teacher

    def run_round(self, index: int) -> float:
        """One round over all tasks and one optimizer step; this rank's part of the loss."""
        self.seconds, self.passes = {}, {"forward": 0, "backward": 0}
        names, total = list(self._config.tasks), 0.0
        for name in names:
            with self._phase("encode"):
                cond, noise, prompts = self._draw(index, name)
            with self._phase("rollout"):
                states = self._roll_out(cond, noise)
            if self.scoring is not None:
                with self._phase("rewards"):
                    self.scoring(name, states[-1], prompts)
            with self._phase("score"):
                means = self._replay_by_teacher(name, states, cond)
            with self._phase("train"):
                total += self._replay_by_student(name, states, means, cond, last=name == names[-1])
        with self._phase("step"):
            self._step(index)
        return total

    def _draw(self, index: int, task: str) -> tuple[Conditioning, Tensor, list[str]]:
        samples, seed, world = self._config.rollout.samples, self._config.run.seed, self._group.world
        part, known = shard(samples, world.rank, world.size), self._prompts[task]
        drawn = draw_prompts(len(known), samples, seed, index, task)
        prompts = [known.prompts[drawn[i]] for i in part.indices]
        noise = SampleNoise([sample_seed(seed, index, task, i) for i in part.indices], self.family.latent_shape)
        return self.family.encode(prompts), noise.draw(slice(None)).to(self._group.device), prompts

    @torch.no_grad()
    def _roll_out(self, cond: Conditioning, x: Tensor) -> list[Tensor]:
        states = [x]
        for step in range(self._config.rollout.steps):
            states.append(self._mean(self._network, states[-1], step, cond, self._config.rollout.guidance))
        return states

    @torch.no_grad()
    def _replay_by_teacher(self, task: str, states: list[Tensor], cond: Conditioning) -> list[Tensor]:
        guidance = self._config.tasks[task].teacher.guidance
        with self._teacher(task) as teacher:
            return [self._mean(teacher, state, step, cond, guidance) for step, state in enumerate(states[:-1])]

    def _replay_by_student(
        self, task: str, states: list[Tensor], means: list[Tensor], cond: Conditioning, *, last: bool
    ) -> float:
        steps, total = self._config.trained_steps, torch.zeros((), device=self._group.device)
        for step in range(steps):
            with self._unless(last and step == steps - 1):
                mean = self._mean(self._student, states[step], step, cond, self._config.rollout.guidance)
                loss = 0.5 * (mean - means[step]).square().mean() * self._config.tasks[task].weight / steps
                loss.backward()
            total += loss.detach()
        return float(total)

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

    @contextmanager
    def _teacher(self, task: str) -> Iterator[nn.Module]:
        if not self._teachers:
            lora.activate(self._network, task)
            yield self._network
            lora.activate(self._network, STUDENT_ADAPTER, trainable=True)
            return
        teacher = self._teachers[task]
        offloaded = self._config.tasks[task].teacher.placement == "offload"
        yield teacher.to(self._group.device)
        if offloaded:
            teacher.to("cpu")

    def _unless(self, synchronise: bool) -> AbstractContextManager[Any]:
        """DDP adds gradients up over ranks with the last backward of a round only."""
        alone = self._group.world.size == 1
        return nullcontext() if synchronise or alone else self._student.no_sync()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
