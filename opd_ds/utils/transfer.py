"""Copies to a device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host on `device`. From pageable memory the host would wait until the device has caught up."""
    if device.type == values.device.type:
        return values
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """A copy of `values` on the host, which is made when the device comes to it; what is returned waits for it."""
    if values.device.type == "cpu":
        return lambda: values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    made = torch.Event(values.device)
    made.record()

    def wait() -> Tensor:
        made.synchronize()
        return copy

    return wait


def moved(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in its mappings, lists and tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(one, device) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(one, device) for one in value)
    return value
