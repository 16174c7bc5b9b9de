"""Who am I: rank, world size and rendezvous of this process, before anything heavy is imported."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opd_ds.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def who_am_i(environment: Mapping[str, str] = os.environ) -> World:
    """Read RANK, LOCAL_RANK, WORLD_SIZE (deepspeed launcher, torchrun); none of them means a single process.

    Raises:
        UserError: some are there and others not, or they contradict each other.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in names if name in environment]
    if not present:
        return World()
    if len(present) < len(names):
        missing = ", ".join(sorted(set(names) - set(present)))
        raise UserError(f"{', '.join(present)} set but {missing} not; start with the deepspeed launcher or torchrun")
    rank, local_rank, size = (int(environment[name]) for name in names)
    if not 0 <= rank < size:
        raise UserError(f"RANK = {rank} does not fit WORLD_SIZE = {size}")
    local_size = int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", size)))
    return World(rank, local_rank, size, local_size)


def prepare_environment(world: World) -> None:
    """Environment that DeepSpeed and torch read when they start; call before importing them."""
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    # The launcher may be started by path from an environment that is not activated; DeepSpeed looks for ninja in PATH.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
