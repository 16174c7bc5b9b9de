"""The loop of Flow-Factory's trainer `diffusion-opd`.

First the rollouts of all tasks. Then, without a gradient, one teacher after the other: its LoRA's weights are put into
the student's adapter, and it is asked step by step at the trained states of its task. Then the student alone, step by
step with a backward each.

Different there: gradients are added up by DeepSpeed's ZeRO-2, and the loss has no factor of one half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.peer import PeerLoop
from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group
from opd_ds.models import lora


class FlowFactoryLoop(PeerLoop):
    """Rounds of Flow-Factory; teachers are LoRAs of the student's rank, strength and target modules."""

    def __init__(self, config: DistilConfig, group: Group) -> None:
        self._snapshots: dict[str, dict[str, Tensor]] = {}
        super().__init__(config, group)

    def _load_teacher(self, task: str, path: Path) -> None:
        settings, (found, state) = self._config.student.lora, lora.read_adapter(path, self.family.pipeline_class)
        assert (found.r, found.lora_alpha) == (settings.rank, settings.alpha), "only strengths that need no rescaling"
        self._snapshots[task] = {key: value.to(self._group.device, torch.float32) for key, value in state.items()}

    @contextmanager
    def _teacher(self, task: str) -> Iterator[nn.Module]:
        own = lora.adapter_parameters(self._network, STUDENT_ADAPTER)
        kept = {key: parameter.detach().clone() for key, parameter in own.items()}
        _copy(self._snapshots[task], own)
        yield self._network
        _copy(kept, own)

    def _accumulate(self, index: int) -> float:
        rollouts = [self._rollout(index, name) for name in self._config.tasks]
        steps, targets = range(self._config.trained_steps), {}
        for rollout in rollouts:
            with self._phase("score"), self._teacher(rollout.task) as teacher:
                targets[rollout.task] = [self._taught(teacher, rollout, step) for step in steps]
        total = torch.zeros((), device=self._group.device)
        with self._phase("train"):
            for rollout in rollouts:
                for step in steps:
                    total += self._learn(rollout, step, targets[rollout.task][step])
        return float(total)


@torch.no_grad()
def _copy(state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(state[key])
