"""Starting the process group, and the few collectives the rest of the program needs."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.launch import World

STALE_BUILD_SECONDS = 600


class Group:
    """All ranks of the run."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in float64 so that the order of ranks costs nothing visible; on the CPU."""
        from deepspeed import comm

        total = values.detach().to(self.device, torch.float64)
        comm.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        from deepspeed import comm

        values: list[Any] = [None] * self.world.size
        comm.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        from deepspeed import comm

        comm.barrier()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Work that may fail on some ranks only (files, say): every rank leaves with the first error, or none does.

        Nothing inside may be collective: a rank that failed would not take part.
        """
        failure: str | None = None
        cause: UserError | None = None
        try:
            yield
        except UserError as error:
            failure, cause = str(error), error
        failures = self.gather(failure)
        for rank, message in enumerate(failures):
            if message is not None:
                where = f"[rank {rank}] " if any(other != message for other in failures) else ""
                raise UserError(where + message) from cause


def init_group(world: World, timeout: timedelta = timedelta(minutes=30)) -> Group:
    """Start DeepSpeed's process group (nccl on CUDA, gloo on CPU).

    Raises:
        UserError: on a CPU without a C++ compiler, which DeepSpeed needs there once.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if on_cpu and world.size > 1:
        _require_compiler()
        if world.local_rank == 0:
            _remove_stale_build_lock()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed asks its own scheduler for a rate before the first step, and warns about it.
    logger.addFilter(lambda record: "before it has started" not in record.getMessage())
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, once per call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    accelerator = get_accelerator()
    if not on_cpu:
        accelerator.set_device(world.local_rank)
    deepspeed.init_distributed(accelerator.communication_backend_name(), auto_mpi_discovery=False, timeout=timeout)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), world.local_rank)
    return Group(world, device)


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise UserError(
            f"no C++ compiler ({compiler}): on CPU DeepSpeed compiles a small communication op at its first start; "
            "install one (Debian: apt install g++; conda: gxx) or set CXX"
        )


def _remove_stale_build_lock() -> None:
    """A killed op build leaves a lock file on which every later start waits for ever, in silence."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_BUILD_SECONDS:
        logging.getLogger("opd_ds").warning("removing %s, left by a build that was killed", lock)
        lock.unlink(missing_ok=True)
