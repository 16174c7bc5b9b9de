"""What an accelerator has free, and giving its cache back."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from deepspeed.accelerator import get_accelerator

# Of glibc's malloc.h; sizes in bytes. Smaller tensors are many, and cheap to keep.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 1 << 20


def return_freed_memory() -> None:
    """From now on host memory of large tensors goes back to the system when they are freed.

    glibc takes the size of what is freed for what will be wanted again, up to 32 MiB, and keeps pieces in between and
    in each thread's arena: gathered and released weights then stay in every rank's process, several times their size.
    Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _LARGE), (_M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


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
