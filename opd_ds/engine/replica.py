"""A sharded network, whole on every rank for a while: for rollouts, which use every weight at every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from opd_ds.engine.comm import Group
from opd_ds.engine.memory import free_memory
from opd_ds.engine.privates import is_gathered, whole_numel

_AT_ONCE = 50_000_000  # elements in one collective
# The part of the free memory that gathered weights may take; activations of a rollout need the rest.
_SHARE_OF_FREE = 0.5


class UnshardedReplica:
    """The modules of a network a second time, without weights and without DeepSpeed's hooks.

    Its weights come from the sharded network when they are needed (`materialized`). DeepSpeed's hooks could be taken
    off and put on again instead, as others do; then it forgets, each time, in which order to prefetch for training
    (0.19.8, parameter_offload.py, `_register_deepspeed_module`).

    Args:
        module: before `deepspeed.initialize`, which makes hooks of it.
    """

    def __init__(self, module: nn.Module) -> None:
        memo: dict[int, object] = {
            id(value): nn.Parameter(torch.empty(0, dtype=value.dtype, device=value.device), requires_grad=False)
            for value in module.parameters()
        }
        memo |= {id(value): value for value in module.buffers()}
        self._replica: nn.Module = copy.deepcopy(module, memo)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []

    @contextmanager
    def materialized(self, module: nn.Module) -> Iterator[nn.Module]:
        """Inside, the replica has the weights of `module`, the very network under ZeRO-3. Collective.

        What is gathered is not copied: DeepSpeed lets go of a storage that the replica holds on to.
        """
        replicas = dict(self._replica.named_parameters())
        pairs = [(parameter, replicas[name]) for name, parameter in module.named_parameters()]
        for name, owner in module.named_modules():  # DeepSpeed replaces buffers when it changes their dtype
            self._replica.get_submodule(name)._buffers.update(owner._buffers)
        try:
            for bucket in _buckets(pairs):
                with deepspeed.zero.GatheredParameters([parameter for parameter, _ in bucket]):
                    for parameter, replica in bucket:
                        replica.data = parameter.data
            yield self._replica
        finally:
            for _, replica in pairs:
                replica.data = torch.empty(0, dtype=replica.dtype, device=replica.device)


def _buckets(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
    """Small ("persistent") parameters are whole already, and stay so: they are taken as they are."""
    bucket: list[tuple[nn.Parameter, nn.Parameter]] = []
    size = 0
    for parameter, replica in pairs:
        if is_gathered(parameter):
            replica.data = parameter.data
            continue
        numel = whole_numel(parameter)
        if bucket and size + numel > _AT_ONCE:
            yield bucket
            bucket, size = [], 0
        bucket.append((parameter, replica))
        size += numel
    if bucket:
        yield bucket


def fits(module: nn.Module, group: Group) -> bool:
    """Whether every rank can hold a whole network under ZeRO-3. Collective."""
    needed = sum(whole_numel(parameter) * parameter.element_size() for parameter in module.parameters())
    return min(group.gather(_free_bytes(group))) * _SHARE_OF_FREE > needed


def _free_bytes(group: Group) -> int:
    """What of it is this rank's."""
    return free_memory(group.device) // (group.world.local_size if group.device.type == "cpu" else 1)
