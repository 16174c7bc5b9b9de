"""The part `versions`: what is installed, and what the device can do."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module

import torch

from benchmarks.gpu.session import Session, synchronise
from benchmarks.speed.worker import matmul_peak

_LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy")
_GIB = 2**30


def versions(session: Session) -> None:
    """Versions one by one, so that one library that does not load does not hide the others."""
    with session.check("python") as found:
        found["version"] = sys.version.split()[0]
        found["system"] = platform.platform()
    for name in (*_LIBRARIES, *(("triton",) if session.on_gpu else ())):
        with session.check(name) as found:
            found["version"] = str(import_module(name).__version__)
    with session.check("device") as found:
        found["name"] = torch.cuda.get_device_name() if session.on_gpu else "cpu"
        found["threads"] = torch.get_num_threads()
        if session.on_gpu:
            free, total = torch.cuda.mem_get_info()
            found |= {"cuda": torch.version.cuda, "memory, GiB": total / _GIB, "free, GiB": free / _GIB}
            found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
            found["driver"] = _driver()
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for precision in ("bf16", "fp32"):
        with session.check(f"{precision} matrix product") as found:
            found["TFLOP/s"] = matmul_peak(session.group, precision) / 1e12
    with session.check("copy on the device") as found:
        found["GB/s"] = _copied_per_second(session, "device") / 1e9
    if session.on_gpu:
        for kind in ("pinned", "pageable"):
            with session.check(f"host to device, {kind}") as found:
                found["GB/s"] = _copied_per_second(session, kind) / 1e9


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _copied_per_second(session: Session, source: str) -> float:
    """Bytes; on the device a copy reads and writes, and both count."""
    size = 2**30 if session.on_gpu else 2**26
    device = session.group.device
    target = torch.empty(size, dtype=torch.uint8, device=device)
    if source == "device":
        origin = torch.empty_like(target)
    else:
        origin = torch.empty(size, dtype=torch.uint8, pin_memory=source == "pinned")
        origin.fill_(1)
    return (2 if source == "device" else 1) * size / _fastest(lambda: target.copy_(origin, non_blocking=True))


def _fastest(work: Callable[[], object], times: int = 5) -> float:
    """Seconds."""
    best = float("inf")
    for _ in range(times):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        best = min(best, time.perf_counter() - started)
    return best
