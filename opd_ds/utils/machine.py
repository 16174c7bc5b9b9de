"""What this machine has."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def host_memory(limits: tuple[Path, ...] = _CGROUP_LIMITS) -> int:
    """Bytes of memory that processes here may use: the machine's, or its container's or job's share (cgroups)."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    texts = [file.read_text().strip() for file in limits if file.is_file()]
    return min([whole, *(int(text) for text in texts if text.isdecimal())])
