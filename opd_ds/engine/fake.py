"""One rank of a world that is not there, for counting what ranks hold and send."""

from __future__ import annotations

import os

import torch

from opd_ds.cluster.world import World
from opd_ds.engine import privates
from opd_ds.engine.comm import Group


class _FakeGroup(Group):
    exchanges = False


def fake_group(world: World) -> Group:
    """This process as `world.rank`, on the CPU. Collectives return at once with tensors of the right shapes, and what
    is in them is undefined; `Group.gather` cannot be used. One such group per process, and no other beside it.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend; torch 2.8 to 2.13

    torch.distributed.init_process_group("fake", rank=world.rank, world_size=world.size, store=FakeStore())
    privates.leave_out_shm_op()
    deepspeed.init_distributed("fake", auto_mpi_discovery=False)
    return _FakeGroup(world, torch.device("cpu"))
