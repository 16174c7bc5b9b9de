"""What every rank sees of its own process and node."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from opd_ds import TORCHVISION_PROBLEM, __version__
from opd_ds.cluster.world import World
from opd_ds.doctor.findings import Seen, attempt, same_everywhere, size_text

_PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "datasets", "tensorboard")
_DRIVER = Path("/proc/driver/nvidia/version")
_INFINIBAND = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")
# NCCL maps about 10 MiB for each connection; Docker's default is 64 MiB in all.
SHARED_MEMORY_PER_RANK = 128 * 2**20
SPACE_FOR_MODELS = 10 * 2**30


def look_at_node(world: World) -> list[Seen]:
    """Versions, accelerators, compiler, memory and file limits."""
    seen = [same_everywhere("opd-ds", __version__), same_everywhere("Python", platform.python_version())]
    seen += [_package(name) for name in _PACKAGES]
    checks: dict[str, Callable[[], Iterator[Seen]]] = {
        "torchvision": _torchvision,
        "CUDA runtime": _runtime,
        "driver": _driver,
        "accelerator": lambda: accelerator(world),
        "C++ compiler": _compiler,
        "shared memory": lambda: shared_memory(world),
        "open files": lambda: open_files(world),
        "locked memory": lambda: locked_memory(world),
        "disk for models": lambda: disk_for_models(world),
    }
    for what, look in checks.items():
        seen += attempt(what, look)
    return seen


def _package(name: str) -> Seen:
    try:
        return same_everywhere(name, version(name))
    except PackageNotFoundError:
        return Seen(name, "absent", "pip install opd-ds", agree="absent")


def _torchvision() -> Iterator[Seen]:
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        yield Seen("torchvision", "absent, not needed")
        return
    if TORCHVISION_PROBLEM is None:
        yield Seen("torchvision", f"{found}, loads, not needed")
        return
    yield Seen(
        "torchvision",
        f"{found}, does not load ({TORCHVISION_PROBLEM}); it is treated as absent",
        "nothing here needs it: pip uninstall torchvision, or install the build that belongs to your torch",
    )


def _runtime() -> Iterator[Seen]:
    import torch

    hip = getattr(torch.version, "hip", None)
    yield same_everywhere("CUDA runtime", torch.version.cuda or (f"ROCm {hip}" if hip else "none in this torch"))
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        yield same_everywhere("NCCL", ".".join(str(part) for part in torch.cuda.nccl.version()))
    else:
        yield same_everywhere("NCCL", "none; gloo on CPU")


def _driver() -> Iterator[Seen]:
    yield same_everywhere("driver", driver_version() or "no NVIDIA driver")


def driver_version(file: Path = _DRIVER) -> str | None:
    """Of the NVIDIA kernel module, None where there is none."""
    if not file.is_file():
        return None
    match = re.search(r"\b\d{3}\.\d+(\.\d+)*\b", file.read_text())
    return match[0] if match else "of unknown version"


def accelerator(world: World) -> Iterator[Seen]:
    """Devices and processes on the node; nodes of different kinds make no run."""
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    processes = f"{world.local_size} process{'es' * (world.local_size != 1)} on the node"
    wants_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if count == 0 or wants_cpu:
        found = f"none, {os.cpu_count()} CPU cores, {processes}"
        if count:
            found = f"{count} left alone (DS_ACCELERATOR=cpu), {os.cpu_count()} CPU cores, {processes}"
        problem = None
        if driver_version() and not wants_cpu:
            problem = (
                "there is an NVIDIA driver but torch sees no device: install a CUDA build of torch that this driver "
                "can run, look at CUDA_VISIBLE_DEVICES, or set DS_ACCELERATOR=cpu to go without"
            )
        yield Seen("accelerator", found, problem, agree="cpu")
        return
    kind = str(torch.accelerator.current_accelerator())
    names = {torch.cuda.get_device_name(index) for index in range(count)} if kind.startswith("cuda") else {kind}
    name = ", ".join(sorted(names))
    problem = too_many_processes(world, count)
    alone = None if problem or not kind.startswith("cuda") else _device_id(world, count)
    yield Seen("accelerator", f"{count} x {name}, {processes}", problem, agree=name, alone=alone)


def _device_id(world: World, count: int) -> str | None:
    """Of the device this rank will use, the same on no two ranks."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(world.local_rank if count > 1 else 0), "uuid", None)
    return f"device {uuid}" if uuid is not None else None


def too_many_processes(world: World, devices: int) -> str | None:
    """What to do when the processes of a node do not fit the `devices` each sees. One device may be a rank's own (srun
    --gpus-per-task); whether it is, only all ranks together know."""
    if world.local_size <= devices or devices == 1:
        return None
    return (
        f"{world.local_size} processes for {devices} devices: start at most one a device "
        "(--ntasks-per-node, --num_gpus, --nproc-per-node)"
    )


def _compiler() -> Iterator[Seen]:
    """DeepSpeed compiles the Adam of an offloaded optimizer, and what reads and writes NVMe; nothing else needs one."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    absent = "absent: needed where an optimizer is offloaded (apt install g++, or set CXX)"
    yield Seen("C++ compiler", compiler or absent)


def shared_memory(world: World, folder: Path = _SHARED_MEMORY) -> Iterator[Seen]:
    """Ranks of one node talk through it."""
    if world.local_rank > 0:
        return
    if not folder.is_dir():
        problem = "ranks of one node talk through it; mount a tmpfs there" if world.local_size > 1 else None
        yield Seen("shared memory", f"no {folder}", problem)
        return
    usage, needed = shutil.disk_usage(folder), SHARED_MEMORY_PER_RANK * world.local_size
    problem = None
    if world.local_size > 1 and usage.free < needed:
        problem = (
            f"{world.local_size} ranks need about {size_text(needed)}, NCCL fails without: start the container with "
            "--shm-size (or --ipc=host), or remount it larger"
        )
    yield Seen("shared memory", f"{size_text(usage.free)} free of {size_text(usage.total)} ({folder})", problem)


def open_files(world: World) -> Iterator[Seen]:
    """Each rank keeps a few sockets open to each other one, and its weights."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = 512 + 4 * world.size
    problem = f"{world.size} ranks need about {needed}: ulimit -n {max(needed, 65536)}"
    enough = limit == resource.RLIM_INFINITY or limit >= needed
    yield Seen(
        "open files",
        "unlimited" if limit == resource.RLIM_INFINITY else f"at most {limit}",
        None if enough else problem,
    )


def locked_memory(world: World, infiniband: Path = _INFINIBAND) -> Iterator[Seen]:
    """InfiniBand registers its buffers as locked memory; elsewhere the limit is of no consequence."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        yield Seen("locked memory", "unlimited")
        return
    found = f"at most {size_text(limit)}"
    if not (infiniband.is_dir() and any(infiniband.iterdir())):
        yield Seen("locked memory", f"{found}; no InfiniBand here, which would mind")
        return
    problem = "InfiniBand needs more between nodes: ulimit -l unlimited (Docker: --ulimit memlock=-1)"
    yield Seen("locked memory", f"{found}; InfiniBand is here", problem if world.local_size < world.size else None)


def disk_for_models(world: World) -> Iterator[Seen]:
    """Where models from the hub would go; one rank a node looks."""
    if world.local_rank > 0:
        return
    home = os.path.expanduser("~")
    folder = os.environ.get("HF_HOME", home)
    free = shutil.disk_usage(folder if os.path.isdir(folder) else home).free
    small = "less than 10 GiB for downloaded models; set HF_HOME to a larger disk"
    found = f"{size_text(free)} free ({folder})"
    yield Seen("disk for models", found, small if free < SPACE_FOR_MODELS else None)
