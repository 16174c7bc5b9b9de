"""Frozen networks by placement: where their weights are between two calls, and how they are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from opd_ds.engine import FrozenEngine, StudentEngine, free_memory
from opd_ds.models import block_names, lora
from opd_ds.models.host_weights import BlockStream, HostMemory, HostWeights


class FrozenNetwork(ABC):
    """A network that is asked and never changes. It may have several adapters."""

    @abstractmethod
    @contextmanager
    def asked(self, adapter: str | None) -> Iterator[Callable[..., Any]]:
        """Inside, the network is on the device, with `adapter` switched on, or none."""

    def prefetch(self) -> None:  # noqa: B027 (most have nothing to do)
        """It is queried next: its transfer starts now if the device can hold it."""


class InStudent(FrozenNetwork):
    """The student's own network (`placement: shared`), with a frozen adapter in the place of its own, or with none."""

    def __init__(self, student: StudentEngine) -> None:
        self._student = student

    @contextmanager
    def asked(self, adapter: str | None) -> Iterator[Callable[..., Any]]:
        with torch.no_grad(), self._student.using(adapter) as network:
            yield network


class _Separate(FrozenNetwork):
    """A network of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False).eval()

    @contextmanager
    def asked(self, adapter: str | None) -> Iterator[Callable[..., Any]]:
        with lora.using(self.module, adapter) if adapter is not None else nullcontext(), self._on_device() as network:
            yield network

    @contextmanager
    def _on_device(self) -> Iterator[Callable[..., Any]]:
        yield self.module


class Resident(_Separate):
    """On the device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module)
        module.to(device)


class Sharded(_Separate):
    """Over all ranks, by ZeRO-Inference: each forward is a collective."""

    def __init__(self, module: nn.Module, ds_config: dict[str, Any]) -> None:
        super().__init__(module)
        self._engine = FrozenEngine(module, ds_config)

    @contextmanager
    def _on_device(self) -> Iterator[Callable[..., Any]]:
        yield self._engine


class Offloaded(_Separate):
    """On the host, once per node; on the device while it is asked."""

    def __init__(self, module: nn.Module, device: torch.device, memory: HostMemory | None) -> None:
        super().__init__(module)
        self._device, self._weights = device, HostWeights(module, device, memory)

    @contextmanager
    def _on_device(self) -> Iterator[Callable[..., Any]]:
        with self._weights.on_device():
            yield self.module

    def prefetch(self) -> None:
        if self._weights.needs_transfer:
            self._weights.prefetch(free_memory(self._device))


class Streamed(_Separate):
    """On the host, once per node; block by block on the device with every forward."""

    def __init__(self, module: nn.Module, device: torch.device, memory: HostMemory | None) -> None:
        super().__init__(module)
        self._stream = BlockStream(module, HostWeights(module, device, memory), block_names(module), device)

    @contextmanager
    def _on_device(self) -> Iterator[Callable[..., Any]]:
        with self._stream.on_device():
            yield self.module
