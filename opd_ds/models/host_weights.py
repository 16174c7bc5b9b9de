"""A frozen network's weights on the host, packed into one buffer, and on the device while they are needed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 256  # bytes; what the devices' allocators give, and kernels may count on


class HostMemory:
    """Where packed weights stand: here, in memory of this process alone.

    Attributes:
        fills: whether this process brings the weights; one that does not may build its networks without.
    """

    fills = True

    def agreed(self, value: Any) -> Any:
        """The value of the process that fills the buffer which this one reads."""
        return value

    def buffer(self, nbytes: int) -> AbstractContextManager[Tensor]:
        """Bytes to fill inside the context; they are there for all who read them after it."""
        return nullcontext(torch.empty(nbytes, dtype=torch.uint8))


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer of the network, and where it is packed: bytes from `start`."""

    tensor: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def of(self, packed: Tensor, first: int = 0) -> Tensor:
        """The weight in `packed`, whose bytes begin at `first` of the whole: a view."""
        start = self.start - first
        return packed[start : start + self.nbytes].view(self.dtype).view(self.shape)


class HostWeights:
    """All weights of a network in one buffer on the host, which its tensors are views of, registered with the device.

    One buffer, because torch's pinning allocator rounds every tensor up to a power of two, and because a buffer can be
    shared by the processes of a node. Weights are frozen: they are copied to the device and never back.

    Args:
        network: any number of processes may build theirs on the meta device, where `memory` is filled by another.
    """

    def __init__(self, network: nn.Module, device: torch.device, memory: HostMemory | None = None) -> None:
        memory = memory or HostMemory()
        self._device = device
        self._copies: list[Tensor] | None = None  # on the device, or on their way
        self._in_use = self._stays = False
        tensors = _tensors(network)
        layout = memory.agreed([(tuple(tensor.shape), tensor.dtype) for tensor in tensors.values()])
        starts, self.nbytes = [], 0
        for shape, dtype in layout:
            starts.append(self.nbytes)
            self.nbytes += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._slots: dict[str, _Slot] = {}
        with memory.buffer(self.nbytes) as self._packed:
            for (name, old), (shape, dtype), start in zip(tensors.items(), layout, starts, strict=True):
                view = _Slot(old, shape, dtype, start).of(self._packed)
                if memory.fills:
                    view.copy_(old)
                self._slots[name] = _Slot(_replaced(network, name, old, view), shape, dtype, start)
        if device.type == "cuda":
            _register(self, self._packed)

    @property
    def needs_transfer(self) -> bool:
        """Whether weights have to come to a device: a CPU computes where they are."""
        return self._device.type != "cpu"

    def span(self, names: list[str]) -> tuple[int, int]:
        """First byte and end of neighbouring weights."""
        slots = [self._slots[name] for name in names]
        return slots[0].start, slots[-1].start + slots[-1].nbytes

    def names(self, module: str | None = None) -> list[str]:
        """Of all weights, or of those under `module`, which are neighbours."""
        return [name for name in self._slots if module is None or name.startswith(f"{module}.")]

    def bytes(self, first: int, end: int) -> Tensor:
        """A stretch of the host's buffer."""
        return self._packed[first:end]

    def point(self, names: list[str], packed: Tensor | None = None, first: int = 0) -> None:
        """Let tensors of the network be views of `packed`, whose bytes begin at `first` of the whole; None: at home."""
        for name in names:
            slot = self._slots[name]
            slot.tensor.data = slot.of(self._packed if packed is None else packed, first)

    def stay_on(self, names: list[str]) -> None:
        """Tensors that are on the device for good."""
        for name in names:
            self._slots[name].tensor.data = self._slots[name].of(self._packed).to(self._device)

    # ---- all of them, for a while ----

    def prefetch(self, free: int) -> None:
        """The next `on_device` comes: the copies start on a side stream if they fit into `free` bytes. While
        they are in use already, they stay for it.
        """
        if not self.needs_transfer:
            return
        if self._in_use:
            self._stays = True
        elif self._copies is None and free > 2 * self.nbytes:
            try:
                self._fetch()
            except torch.OutOfMemoryError:  # what is free and what can be allocated may differ; it fits later
                self._copies = None

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the network's weights are on the device."""
        if not self.needs_transfer:
            yield
            return
        if self._copies is None:
            self._fetch()
        assert self._copies is not None
        here = torch.accelerator.current_stream(self._device)
        here.wait_stream(side_stream(self._device))
        for slot, copy in zip(self._slots.values(), self._copies, strict=True):
            copy.record_stream(here)  # or the allocator could hand it out again before it has been used
            slot.tensor.data = copy
        self._in_use, self._stays = True, False
        try:
            yield
        except BaseException:
            self._stays = False
            raise
        finally:
            self._in_use = False
            if not self._stays:
                self._copies = None
                self.point(self.names())

    def _fetch(self) -> None:
        with side_stream(self._device):
            self._copies = [
                slot.of(self._packed).to(self._device, non_blocking=True, copy=True) for slot in self._slots.values()
            ]


class BlockStream:
    """A network whose blocks come to the device one by one in each forward, the next while one computes.

    Two of them are on the device at once, in two buffers that take turns; everything outside of the blocks stays there.

    Args:
        weights: of `network`.
        blocks: names of modules, in the order in which they run; another order costs waiting, no more.
    """

    def __init__(self, network: nn.Module, weights: HostWeights, blocks: list[str], device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._names = [weights.names(block) for block in blocks]
        self._spans = [weights.span(names) for names in self._names]
        within = {name for names in self._names for name in names}
        self._outside = [name for name in weights.names() if name not in within]
        self._coming: int | None = None  # the block that is in `_buffers[0]`, or on its way
        self._buffers: list[Tensor] = []
        if not weights.needs_transfer:
            return
        weights.stay_on(self._outside)
        for index, block in enumerate(blocks):
            module = network.get_submodule(block)
            module.register_forward_pre_hook(lambda *_, index=index: self._arrive(index))
            module.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the network can be asked."""
        if not self._weights.needs_transfer:
            yield
            return
        largest = max(end - first for first, end in self._spans)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]
        try:
            self._send(0)
            yield
        finally:
            here = torch.accelerator.current_stream(self._device)
            here.wait_stream(
                side_stream(self._device)
            )  # what was sent for nothing is written before its memory is freed
            self._buffers, self._coming = [], None

    def _send(self, index: int) -> None:
        """The block into the buffer that is not in use, once what was computed with it is done."""
        stream = side_stream(self._device)
        stream.wait_stream(torch.accelerator.current_stream(self._device))
        first, end = self._spans[index]
        with stream:
            self._buffers[0][: end - first].copy_(self._weights.bytes(first, end), non_blocking=True)
        self._coming = index

    def _arrive(self, index: int) -> None:
        if self._coming != index:
            self._send(index)
        torch.accelerator.current_stream(self._device).wait_stream(side_stream(self._device))
        self._weights.point(self._names[index], self._buffers[0], self._spans[index][0])
        self._buffers.reverse()
        self._send((index + 1) % len(self._spans))

    def _leave(self, index: int) -> None:
        self._weights.point(self._names[index])


@cache
def side_stream(device: torch.device) -> torch.Stream:
    """The one on which weights travel. The allocator keeps freed memory for the stream that it came from (torch 2.13):
    with a new stream at each fetch a network's memory would stay reserved in every one of them.
    """
    return torch.Stream(device=device)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those of a module next to one another; what is used twice once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def _replaced(network: nn.Module, name: str, old: Tensor, view: Tensor) -> Tensor:
    """`view` as the network's tensor `name`; a tensor without memory cannot be pointed elsewhere."""
    if old.device.type != "meta":
        old.data = view
        return old
    path, _, leaf = name.rpartition(".")
    new = nn.Parameter(view, requires_grad=False) if isinstance(old, nn.Parameter) else view
    setattr(network.get_submodule(path), leaf, new)
    return new


def _register(owner: object, packed: Tensor) -> None:
    """Page-lock the buffer, so that copies from it need not be waited for."""
    runtime, place = torch.cuda.cudart(), packed.data_ptr()
    code = int(runtime.cudaHostRegister(place, packed.nbytes, 0))
    if code:
        logging.getLogger("opd_ds").warning(
            "%.1f GiB of weights on the host could not be registered with the GPU (CUDA error %d: is `ulimit -l` "
            "unlimited?); they travel more slowly",
            packed.nbytes / 2**30, code,
        )  # fmt: skip
        return
    weakref.finalize(owner, runtime.cudaHostUnregister, place)
