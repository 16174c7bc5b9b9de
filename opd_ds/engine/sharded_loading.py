"""Parameters under ZeRO-3 from their first moment: each rank reads what it owns, and no rank holds a whole network.

DeepSpeed's way, `zero.Init` around a constructor, makes every parameter whole on the device, broadcasts it from rank 0
and cuts it; `deepspeed.initialize` does the same to a whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import nn

from opd_ds.engine import privates
from opd_ds.engine.ds_config import NetworkSizes, fill_sizes
from opd_ds.engine.ds_settings import zero_stage
from opd_ds.models import ParameterBuilder, StoredTensor, WholeParameters


def parameter_builder(
    ds_config: dict[str, Any], device: torch.device, empty_network: Callable[[], nn.Module]
) -> ParameterBuilder:
    """How an engine with `ds_config` wants its network's parameters: sharded under ZeRO-3, else whole on `device`.
    Collective.

    Args:
        empty_network: makes the network on meta: DeepSpeed sizes what swaps to NVMe here, not when the engine is made.
    """
    if zero_stage(ds_config) < 3:
        return WholeParameters(device)
    return ShardedParameters(fill_sizes(ds_config, NetworkSizes.of(empty_network())))


class ShardedParameters:
    """This rank's part of every parameter, on device, host or NVMe as `offload_param` says; hpZ's second part as well.

    Nothing is communicated, but that hpZ's group is made once. `deepspeed.initialize` takes such parameters as they are
    and shards those that are not yet, an adapter's; buffers, hooks and optimizer are made as for any network.
    """

    def __init__(self, ds_config: dict[str, Any]) -> None:
        hierarchical = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        self._init = deepspeed.zero.Init(
            # Given a module `Init` also exchanges torch's linear function for DeepSpeed's, as `deepspeed.initialize`
            # does where it has parameters to shard. This module has none.
            module=nn.Identity(),
            config_dict_or_path=ds_config,
            zero_param_parallel_group=privates.hpz_group() if hierarchical else None,
        )

    @property
    def device(self) -> torch.device:
        return privates.device_of(self._init)

    @torch.no_grad()
    def __call__(self, stored: StoredTensor, dtype: torch.dtype) -> nn.Parameter:
        # Memory that is not written is not there: what is filled of the whole is this rank's part.
        whole = torch.empty(stored.shape, dtype=dtype)
        parameter = nn.Parameter(whole)
        privates.shard_parameter(self._init, parameter)
        for start, stop in privates.parts_to_hold(self._init, parameter):
            if start < stop:
                whole.view(-1)[start:stop] = stored.elements(start, stop)
        privates.keep_own_parts(self._init, parameter)
        return parameter
