"""The loop of Flow-OPD (arXiv 2605.08063) in its mode `gkd`, the closed-form KL.

Every teacher is a whole network of its own on the device, a base with its LoRA. Task by task, as its datasets
alternate: the student's rollout, then step by step the teacher's forward, the student's forward and a backward.

Different there, and not here, because it would change the work or the objective: tasks alternate by epoch with two
updates an epoch, rollouts have noise, one guidance scale serves student and all teachers, and a further frozen network
regularises (its MAR), which is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks.speed.peer import PeerLoop
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.models import lora


class FlowOpdLoop(PeerLoop):
    """Rounds of Flow-OPD; teachers are LoRAs."""

    def __init__(self, config: DistilConfig, group: Group) -> None:
        self._teachers: dict[str, nn.Module] = {}
        super().__init__(config, group)

    def _load_teacher(self, task: str, path: Path) -> None:
        teacher = self.family.load_transformer()
        lora.load_adapter(teacher, task, path, self.family.pipeline_class)
        self._teachers[task] = teacher.requires_grad_(False).eval().to(self._group.device)

    @contextmanager
    def _teacher(self, task: str) -> Iterator[nn.Module]:
        yield self._teachers[task]

    def _accumulate(self, index: int) -> float:
        total = torch.zeros((), device=self._group.device)
        for name in self._config.tasks:
            rollout = self._rollout(index, name)
            with self._teacher(name) as teacher:
                for step in range(self._config.trained_steps):
                    with self._phase("score"):
                        target = self._taught(teacher, rollout, step)
                    with self._phase("train"):
                        total += self._learn(rollout, step, target)
        return float(total)
