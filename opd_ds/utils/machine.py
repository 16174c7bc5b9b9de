"""What this machine has."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def host_memory(limits: tuple[Path, ...] = _CGROUP_LIMITS) -> int:
    """Bytes of memory that processes here may use: the machine's, or its container's or job's share (cgroups)."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    texts = [file.read_text().strip() for file in limits if file.is_file()]
    return min([whole, *(int(text) for text in texts if text.isdecimal())])


def allow_open_files() -> None:
    """Let this process open as many files as it may. Shells start with 1024; rank 0 has two connections to each rank,
    and every shard of a model is one file.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
