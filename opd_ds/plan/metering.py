"""Work and memory of a network's passes, measured on the meta device: every operation runs, without data.

Storages that operations make are counted while they live, as an allocator would. What a network keeps between forward
and backward is therefore measured on its true architecture, whatever it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Cost:
    """One pass over a batch.

    Attributes:
        flops: multiply-adds count twice; products of matrices, convolutions and attention only.
        peak: most bytes alive at once that the pass made itself, its parameters' gradients one at a time.
        saved: bytes alive after the forward; what backward needs.
        operations: kernels started.
    """

    flops: float
    peak: float
    saved: float
    operations: float

    def divided(self, ranks: int) -> Cost:
        """On each of so many ranks that have a part of the tokens: they start as many kernels."""
        return Cost(self.flops / ranks, self.peak / ranks, self.saved / ranks, self.operations)

    def at(self, batch: int, other: Cost, other_batch: int, wanted: int) -> Cost:
        """The straight line through this cost, at `batch`, and `other`: all grow with the batch like that."""
        share = (wanted - batch) / (other_batch - batch)
        return Cost(*(a + (b - a) * share for a, b in zip(_fields(self), _fields(other), strict=True)))


def _fields(cost: Cost) -> tuple[float, ...]:
    return cost.flops, cost.peak, cost.saved, cost.operations


class Meter(TorchDispatchMode):
    """Inside, bytes of storages and floating-point operations are counted.

    Args:
        known: tensors whose storages are not counted: parameters, inputs.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.flops, self.now, self.peak, self.operations = 0.0, 0, 0, 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}
        self._known = known  # a storage that is gone could give its address to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations += not func.is_view
        packet = func._overloadpacket
        if packet is _ATTENTION:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is _ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.now -= nbytes


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention keeps queries, keys, values, output and one number per row, as fused kernels do on every
    device. On meta tensors torch would take the plain formula, which keeps the whole matrix.
    """
    plain = functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.ndim != 4 or attn_mask is not None or query.shape[-1] != value.shape[-1]:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return _ATTENTION(query, key, value, dropout_p, is_causal, scale=scale)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def forward_cost(network: nn.Module, inputs: dict[str, Any]) -> Cost:
    """A forward without gradient, of a network on meta."""
    with torch.no_grad(), fused_attention(), Meter([*_held(network), *held_tensors(inputs)]) as meter:
        output = network(**inputs)
        saved = meter.now
        del output
    return Cost(meter.flops, meter.peak, saved, meter.operations)


def training_cost(network: nn.Module, inputs: dict[str, Any], loss: Callable[[Any], Tensor]) -> Cost:
    """Forward and backward of a network on meta; gradients of parameters are let go as soon as they are there."""

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in trained]
    with fused_attention(), Meter([*_held(network), *held_tensors(inputs)]) as meter:
        output = network(**inputs)
        saved = meter.now
        loss(output).backward()
        del output
    for hook in hooks:
        hook.remove()
    return Cost(meter.flops, meter.peak, saved, meter.operations)


def _held(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def held_tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of mappings and lists."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in held_tensors(part)]
