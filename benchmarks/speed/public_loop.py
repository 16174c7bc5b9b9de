"""The loop of the public DiffusionOPD code.

Task by task three separate passes: the student's rollout, its trajectory replayed by the task's teacher step by step,
and replayed once more by the student, step by step with a backward each; adapters switched in one network; images
scored in between, in every round, where that is asked for. The last step's teacher velocity is computed and never used.

Full teachers, which the public code does not have, are what one would write first: networks of their own, moved to the
device before a task's replay and away after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks.speed.peer import PeerLoop
from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.models import lora


class PublicLoop(PeerLoop):
    """Rounds of the public loop."""

    def __init__(self, config: DistilConfig, group: Group) -> None:
        self._teachers: dict[str, nn.Module] = {}
        super().__init__(config, group)

    def _load_teacher(self, task: str, path: Path) -> None:
        """A LoRA goes into the student's own network, beside its adapter."""
        if lora.is_adapter(path):
            lora.load_adapter(self._network, task, path, self.family.pipeline_class)
            lora.activate(self._network, STUDENT_ADAPTER, trainable=True)
            return
        teacher = self.family.load_transformer(path).requires_grad_(False).eval()
        resident = self._config.tasks[task].teacher.placement == "resident"
        self._teachers[task] = teacher.to(self._group.device) if resident else teacher

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

    def _accumulate(self, index: int) -> float:
        total = torch.zeros((), device=self._group.device)
        for name in self._config.tasks:
            rollout = self._rollout(index, name)
            with self._phase("score"), self._teacher(name) as teacher:
                targets = [self._taught(teacher, rollout, step) for step in range(self._config.rollout.steps)]
            with self._phase("train"):
                for step in range(self._config.trained_steps):
                    total += self._learn(rollout, step, targets[step])
        return float(total)
