"""The teachers: which one a task asks, where their weights live, and how they are called."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from opd_ds.config.schema import TeacherSection
from opd_ds.engine import FrozenEngine, free_memory, parameter_builder
from opd_ds.errors import UserError, about
from opd_ds.models import ModelFamily, ParameterBuilder, WholeParameters, compile_blocks, lora

_CONFIGS = ("transformer/config.json", "config.json")


@dataclass(frozen=True)
class TeacherSpec:
    """A task's teacher, or the anchor, with its files found: `path` on disk, `ds_config` for ZeRO-Inference."""

    settings: TeacherSection
    path: Path
    ds_config: dict[str, Any] | None = None

    @property
    def is_lora(self) -> bool:
        return lora.is_adapter(self.path)


@cache
def _side_stream(device: torch.device) -> torch.Stream:
    """The one on which weights travel. The allocator keeps freed memory for the stream that it came from (torch 2.13):
    with a new stream at each fetch a network's room would be left behind in every one of them.
    """
    return torch.Stream(device=device)


class _Network:
    """A frozen network with its placement. LoRA teachers of one placement share one base."""

    def __init__(
        self, module: nn.Module, placement: str, device: torch.device, ds_config: dict[str, Any] | None
    ) -> None:
        module.requires_grad_(False).eval()
        self._placement, self._device = placement, device
        self._coming: tuple[torch.Stream, list[Tensor]] | None = None
        self.module = module
        self.forward: Any = module
        if placement == "resident":
            module.to(device)
        elif placement == "zero_inference":
            assert ds_config is not None
            self.forward = FrozenEngine(module, ds_config)
        elif device.type != "cpu":
            self._leave_on_host(device)

    def _leave_on_host(self, device: torch.device) -> None:
        """In pinned memory, from which copies need not be waited for."""
        if self._placement == "stream":
            apply_group_offloading(
                self.module,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,  # the next block travels while this one computes
                record_stream=True,
            )
            return
        for tensor in self._tensors():
            tensor.data = tensor.data.pin_memory()

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def needs_transfer(self) -> bool:
        """Whether the weights have to come to the device, all together, before it is asked."""
        return self._placement == "offload" and self._device.type != "cpu"

    def fetch(self) -> None:
        """Weights set out for the device, on a stream beside, while the device goes on computing."""
        if not self.needs_transfer or self._coming is not None:
            return
        stream = _side_stream(self._device)
        with stream:
            copies = [tensor.data.to(self._device, non_blocking=True, copy=True) for tensor in self._tensors()]
        self._coming = stream, copies

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, an offloaded network's weights are on the device. They never change, so nothing is copied back."""
        if not self.needs_transfer:
            yield
            return
        self.fetch()
        assert self._coming is not None
        stream, copies = self._coming
        here = torch.accelerator.current_stream(self._device)
        here.wait_stream(stream)
        home = [tensor.data for tensor in self._tensors()]
        try:
            for tensor, copied in zip(self._tensors(), copies, strict=True):
                copied.record_stream(here)  # or the allocator could hand it out again before it has been used
                tensor.data = copied
            yield
        finally:
            self._coming = None
            for tensor, host in zip(self._tensors(), home, strict=True):
                tensor.data = host


class TeacherPool:
    """Routes tasks to teachers. All ranks call it in the same order with equally many rows (ZeRO-Inference)."""

    def __init__(
        self, family: ModelFamily, specs: dict[str, TeacherSpec], device: torch.device, *, compiled: bool = False
    ) -> None:
        self._family, self._specs, self._device = family, specs, device
        self._networks: dict[str, _Network] = {}
        self._adapters: dict[str, str | None] = {}
        for tasks in self._shared_networks():
            spec = specs[tasks[0]]
            build = _parameter_builder(spec, device)
            module = self._family.load_transformer(None if spec.is_lora else spec.path, build)
            if spec.is_lora:
                for name, path in self._adapter_names(tasks).items():
                    lora.load_adapter(module, name, path, family.pipeline_class)
            if compiled:
                compile_blocks(module)
            network = _Network(module, spec.settings.placement, device, spec.ds_config)
            for task in tasks:
                self._networks[task] = network
                self._adapters[task] = _adapter_name(specs[task].path) if spec.is_lora else None

    def _shared_networks(self) -> list[list[str]]:
        """Tasks whose teachers can live in one network: adapters of one placement, or the same checkpoint."""
        shared: dict[tuple[str, ...], list[str]] = {}
        for task, spec in self._specs.items():
            where = (spec.settings.placement, str(spec.settings.deepspeed))
            shared.setdefault(("lora" if spec.is_lora else str(spec.path), *where), []).append(task)
        return list(shared.values())

    def _adapter_names(self, tasks: list[str]) -> dict[str, Path]:
        return {_adapter_name(self._specs[task].path): self._specs[task].path for task in tasks}

    @contextmanager
    def active(self, task: str) -> Iterator[Any]:
        """The callable network of the task's teacher, on the device, its adapter switched on."""
        network, adapter = self._networks[task], self._adapters[task]
        if adapter is not None:
            lora.activate(network.module, adapter)
        with network.on_device():
            yield network.forward

    def prefetch(self, task: str) -> None:
        """`task` is asked next: what has to travel sets out, where the device has room for it beside what is there."""
        network = self._networks[task]
        if network.needs_transfer and free_memory(self._device) > 2 * network.nbytes:
            with contextlib.suppress(torch.OutOfMemoryError):  # free, but in pieces: it comes when it is asked
                network.fetch()

    def guidance(self, task: str) -> float:
        return self._specs[task].settings.guidance


def _parameter_builder(spec: TeacherSpec, device: torch.device) -> ParameterBuilder:
    if spec.settings.placement == "zero_inference":
        assert spec.ds_config is not None
        return parameter_builder(spec.ds_config, device)
    return WholeParameters(device if spec.settings.placement == "resident" else torch.device("cpu"))


def _adapter_name(path: Path) -> str:
    """A module-safe name, unique by path."""
    return f"teacher_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def check_weights(family: ModelFamily, key: str, value: str, path: Path, base: str, *, trust_base: bool) -> None:
    """Refuse weights that cannot be compared with the student's, before any network loads.

    Args:
        key, value: where the run config names them, and as what; `path` is where that was found.
        base: the student's base, as the run config names it.

    Raises:
        UserError: not a checkpoint, another base, scheduler, architecture or latent shape; a damaged file.
    """
    with about(f"{key} = {value!r}"):
        if lora.is_adapter(path):
            theirs = lora.named_base(path)
            if theirs and not trust_base and not lora.same_base(theirs, base):
                raise UserError(
                    f"the adapter was trained on base {theirs!r}, the student's is {base!r}; if these are one model "
                    f"under two names, set {key.rpartition('.')[0]}.trust_base=true"
                )
            family.check_adapter(path)
            return
        if not path.is_file() and not any((path / name).is_file() for name in _CONFIGS):
            raise UserError("neither a LoRA nor a checkpoint (no adapter_config.json, no transformer/config.json)")
        family.check_compatible(path)
