"""The teachers: which one a task asks, where their weights live, and how they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.config.teachers import TeacherSection
from opd_ds.engine import StudentEngine, parameter_builder
from opd_ds.models import ModelFamily, ParameterBuilder, ParametersElsewhere, WholeParameters, compile_blocks, lora
from opd_ds.models.host_weights import HostMemory
from opd_ds.training.frozen_networks import FrozenNetwork, InStudent, Offloaded, Resident, Sharded, Streamed


@dataclass(frozen=True)
class TeacherSpec:
    """A task's teacher, or the anchor, with its files found: `path` on disk, `ds_config` for ZeRO-Inference. The
    placement in `settings` is decided.
    """

    settings: TeacherSection
    path: Path
    ds_config: dict[str, Any] | None = None

    @cached_property
    def is_lora(self) -> bool:
        return lora.is_adapter(self.path)


def networks_of(specs: Mapping[str, TeacherSpec]) -> list[list[str]]:
    """Tasks whose teachers can live in one network: the student's, adapters of one placement, or the same
    checkpoint.
    """
    together: dict[tuple[str, ...], list[str]] = {}
    for task, spec in specs.items():
        where = (spec.settings.placement, str(spec.settings.deepspeed), str(spec.settings.quantize))
        alike = "lora" if spec.is_lora or spec.settings.placement == "shared" else str(spec.path)
        together.setdefault((alike, *where), []).append(task)
    return list(together.values())


class TeacherPool:
    """Routes tasks to teachers. All ranks call it in the same order with equally many rows (collective forwards).

    Args:
        student: holds the adapters of `load_shared`; needed where a placement is `shared`.
        memory: where offloaded and streamed weights stand on the host; default: in memory of this process alone.
    """

    def __init__(
        self,
        family: ModelFamily,
        specs: dict[str, TeacherSpec],
        device: torch.device,
        *,
        student: StudentEngine | None = None,
        memory: HostMemory | None = None,
        compiled: bool = False,
    ) -> None:
        self._family, self._specs, self._device, self._student = family, specs, device, student
        self._memory = memory
        self._networks: dict[str, FrozenNetwork] = {}
        for tasks in networks_of(specs):
            network = self._build(tasks, compiled=compiled)
            self._networks |= dict.fromkeys(tasks, network)

    def _build(self, tasks: list[str], *, compiled: bool) -> FrozenNetwork:
        spec = self._specs[tasks[0]]
        placement = spec.settings.placement
        if placement == "shared":
            assert self._student is not None
            return InStudent(self._student)
        path = None if spec.is_lora else spec.path
        build = _parameter_builder(spec, self._family, self._device, self._memory)
        module = self._family.load_transformer(path, build, quantize=spec.settings.quantize)
        if spec.is_lora:
            _add_adapters(module, [self._specs[task] for task in tasks], self._family)
        self._family.share_sequences(module)
        if compiled:  # before hooks that move the weights
            compile_blocks(module)
        if placement == "stream":
            return Streamed(module, self._device, self._memory)
        if placement == "zero_inference":
            assert spec.ds_config is not None
            return Sharded(module, spec.ds_config)
        if placement == "offload":
            return Offloaded(module, self._device, self._memory)
        return Resident(module, self._device)

    @contextmanager
    def active(self, task: str) -> Iterator[Any]:
        """The callable network of the task's teacher, on the device, its adapter switched on (none, where it is a full
        checkpoint); to be asked without a gradient.
        """
        spec = self._specs[task]
        with self._networks[task].asked(_adapter_name(spec.path) if spec.is_lora else None) as network:
            yield network

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, teachers in the student's network are asked in its unsharded replica, if it has one. Collective."""
        if self._student is None or not any(isinstance(network, InStudent) for network in self._networks.values()):
            yield
            return
        with self._student.gathered():
            yield

    @contextmanager
    def drawing(self, task: str) -> Iterator[Any]:
        """`active`, to be asked very often. Collective."""
        with self.gathered(), self.active(task) as network:
            yield network

    def prefetch(self, task: str) -> None:
        """`task` is queried next: its transfer starts now if the device can hold it beside what is there."""
        self._networks[task].prefetch()

    def in_turn(self, tasks: Iterable[str]) -> list[str]:
        """`tasks` in an order in which those of one network are neighbours."""
        networks = list(dict.fromkeys(self._networks.values()))
        return sorted(tasks, key=lambda task: networks.index(self._networks[task]))

    def guidance(self, task: str) -> float:
        return self._specs[task].settings.guidance

    def end(self, code: int | None = None) -> None:
        """They are asked no more; `code`: with which all ranks leave, where they were asked to stop."""


def _parameter_builder(
    spec: TeacherSpec, family: ModelFamily, device: torch.device, memory: HostMemory | None
) -> ParameterBuilder:
    if spec.settings.placement == "zero_inference":
        assert spec.ds_config is not None
        return parameter_builder(spec.ds_config, device, family.empty_transformer)
    if spec.settings.placement == "resident":
        return WholeParameters(device)
    return WholeParameters(torch.device("cpu")) if memory is None or memory.fills else ParametersElsewhere()


def load_shared(module: nn.Module, specs: Iterable[TeacherSpec], family: ModelFamily) -> None:
    """Add the LoRA teachers whose placement is `shared` to the LoRA student's network, as frozen adapters beside its
    own.
    """
    shared = [spec for spec in specs if spec.settings.placement == "shared" and spec.is_lora]
    if shared:
        _add_adapters(module, shared, family)
        lora.activate(module, STUDENT_ADAPTER, trainable=True)


def _add_adapters(module: nn.Module, specs: Iterable[TeacherSpec], family: ModelFamily) -> None:
    for name, path in {_adapter_name(spec.path): spec.path for spec in specs}.items():
        lora.load_adapter(module, name, path, family.pipeline_class)


def _adapter_name(path: Path) -> str:
    """A module-safe name, unique by path."""
    return f"teacher_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
