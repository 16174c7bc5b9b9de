"""What an accelerator has free, and giving its cache back."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated; on a CPU by all processes together.

    On an accelerator: what its driver has free, and what torch's allocator keeps without using it. Not DeepSpeed's
    `available_memory`, which (0.19.8) asks NVML: that knows no UUID or MIG names in CUDA_VISIBLE_DEVICES.
    """
    if device.type == "cpu":
        return int(get_accelerator().available_memory())
    accelerator = torch.get_device_module(device)
    free, _ = accelerator.mem_get_info(device)
    return int(free + accelerator.memory_reserved(device) - accelerator.memory_allocated(device))


def empty_cache() -> None:
    """Give what the allocator keeps without using it back to the driver. `torch.accelerator` can since torch 2.9."""
    get_accelerator().empty_cache()
