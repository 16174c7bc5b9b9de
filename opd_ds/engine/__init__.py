"""The only package that imports DeepSpeed. Written for 0.19.6 to 0.19.x; what is private there is in `privates`."""

import os

import torch

# Where there is none, DeepSpeed (0.19) warns when it is imported, unless it is told.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from opd_ds.engine.channel import Channel, Inbox, Outbox
from opd_ds.engine.comm import Alone, Group, counted_collectives, init_group
from opd_ds.engine.consolidate import consolidated_weights
from opd_ds.engine.ds_components import check_shapes
from opd_ds.engine.ds_config import (
    NetworkSizes,
    fill_sizes,
    frozen_ds_config,
    parameters_on_nvme,
    student_ds_config,
    swapped_apart,
)
from opd_ds.engine.ds_settings import read_ds_config, zero_stage
from opd_ds.engine.fake import fake_group
from opd_ds.engine.frozen import FrozenEngine
from opd_ds.engine.memory import empty_cache, free_memory
from opd_ds.engine.moments import state_bytes
from opd_ds.engine.node_memory import NodeMemory
from opd_ds.engine.schedule import Schedule, learning_rates
from opd_ds.engine.sharded_loading import ShardedParameters, parameter_builder
from opd_ds.engine.shards import ShardReader, write_shard
from opd_ds.engine.snapshots import ShardedEma, WeightSnapshot
from opd_ds.engine.state import OLD_POLICY, START, WAITING
from opd_ds.engine.student import StudentEngine

__all__ = [
    "OLD_POLICY",
    "START",
    "WAITING",
    "Alone",
    "Channel",
    "FrozenEngine",
    "Group",
    "Inbox",
    "NetworkSizes",
    "NodeMemory",
    "Outbox",
    "Schedule",
    "ShardReader",
    "ShardedEma",
    "ShardedParameters",
    "StudentEngine",
    "WeightSnapshot",
    "check_shapes",
    "consolidated_weights",
    "counted_collectives",
    "empty_cache",
    "fake_group",
    "fill_sizes",
    "free_memory",
    "frozen_ds_config",
    "init_group",
    "learning_rates",
    "parameter_builder",
    "parameters_on_nvme",
    "read_ds_config",
    "state_bytes",
    "student_ds_config",
    "swapped_apart",
    "write_shard",
    "zero_stage",
]
