"""Memory that the processes of a node share, for weights that none of them changes."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opd_ds.engine.comm import Group
from opd_ds.models.host_weights import HostMemory


class NodeMemory(HostMemory):
    """Buffers that the first rank of each node fills and the others of the node map. All calls are collective.

    A buffer is an anonymous file (memfd) which the others open through /proc: no name is left behind however a run
    ends, and the size of /dev/shm, small in many containers, does not matter. A rank that cannot open its neighbour's
    (another PID namespace) fills buffers of its own.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        rank = group.world.rank
        hosts = group.gather(socket.gethostname())
        self._source = hosts.index(hosts[rank])
        with _anonymous(mmap.PAGESIZE) as (_, identity):
            found = group.gather(identity)
            if self._source != rank:
                try:
                    os.close(_open(found[self._source]))
                except OSError:
                    self._source = rank
            group.barrier()  # nobody closes a file that another has yet to open
        self.fills = self._source == rank

    def agreed(self, value: Any) -> Any:
        return self._group.gather(value)[self._source]

    @contextmanager
    def buffer(self, nbytes: int) -> Iterator[Tensor]:
        size = max(nbytes, 1)
        with _anonymous(size if self.fills else mmap.PAGESIZE) as (own, identity):
            found = self._group.gather(identity)
            file = own if self.fills else _open(found[self._source])
            try:
                mapped = mmap.mmap(file, size)  # shared; it stays when the file is closed
            finally:
                if not self.fills:
                    os.close(file)
            self._group.barrier()  # nobody closes a file that another has yet to open
        yield torch.frombuffer(mapped, dtype=torch.uint8)[:nbytes]
        self._group.barrier()


@contextmanager
def _anonymous(nbytes: int) -> Iterator[tuple[int, tuple[str, int, int]]]:
    """A file without a name: its descriptor, and how others of the node find it and know it."""
    file = os.memfd_create("opd_ds_weights")
    try:
        os.ftruncate(file, nbytes)
        status = os.fstat(file)
        yield file, (f"/proc/{os.getpid()}/fd/{file}", status.st_dev, status.st_ino)
    finally:
        os.close(file)


def _open(identity: tuple[str, int, int]) -> int:
    """Raises OSError where another or no file is found there."""
    path, device, inode = identity
    file = os.open(path, os.O_RDWR)
    status = os.fstat(file)
    if (status.st_dev, status.st_ino) != (device, inode):
        os.close(file)
        raise OSError(f"{path} is another file")
    return file
