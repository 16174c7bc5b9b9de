"""What a rank holds of the student in full precision: pieces of parameters, by name, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from opd_ds.engine import privates
from opd_ds.engine.comm import Group
from opd_ds.errors import UserError


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements `start` to `start + numel` of the flattened parameter `name`.

    Attributes:
        flat: the fp32 tensor that the optimizer updates; its state is kept under this tensor.
        offset: where the fragment begins in it.
        group: index of the optimizer's param group.
        sub_group: DeepSpeed's number of the flat tensor at stage 3, else None.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int
    group: int = 0
    sub_group: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment of a tensor shaped like `flat` (the master weights themselves, or a moment): a view, 1-D."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]

    @property
    def master(self) -> Tensor:
        """The fp32 master weights: a view, 1-D."""
        return self.of(self.flat)


def fragments(engine: DeepSpeedEngine, zero_stage: int) -> list[Fragment]:
    """All fragments of this rank; over the ranks they cover every trainable parameter, at stage 0 many times."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if zero_stage == 3:
        return list(_of_stage_3(engine.optimizer, names))
    if zero_stage > 0:
        return list(_of_stages_1_and_2(engine.module, privates.sharded_flats(engine.optimizer)))
    return list(_of_stage_0(engine.optimizer, names))


def _of_stage_3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for index, group, flat, parameters in privates.stage_3_groups(optimizer):
        offset = 0
        for parameter in parameters:
            start, share = privates.stage_3_share(optimizer, parameter)
            numel = min(share, privates.whole_numel(parameter) - start)
            if numel > 0:
                yield Fragment(names[id(parameter)], start, numel, flat, offset, group, index)
            offset += share


def _of_stages_1_and_2(module: nn.Module, flats: list[Tensor]) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        address = privates.sharded_address(parameter) if parameter.requires_grad else None
        if address is not None:
            start, numel, offset, group = address
            yield Fragment(name, start, numel, flats[group], offset, group)


def _of_stage_0(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, parameters, masters in privates.plain_groups(optimizer):
        offset = 0
        for index, parameter in enumerate(parameters):
            name, numel = names[id(parameter)], parameter.numel()
            if isinstance(masters, Tensor):
                yield Fragment(name, 0, numel, masters, offset, group)
                offset += numel
            else:
                yield Fragment(name, 0, numel, masters[index], 0, group)


def check_cover(owned: list[Fragment], numels: dict[str, int], group: Group) -> None:
    """Hold what all ranks own together against the trainable parameters. Collective.

    Where DeepSpeed keeps its shards is private (`privates`). Were a part of them overlooked, checkpoints would lack
    it and averages would not follow it, in silence.

    Args:
        numels: elements of every trainable parameter, whole.

    Raises:
        UserError: some elements belong to no rank, or to several.
    """
    if not group.exchanges:
        return
    counts = dict.fromkeys(numels, 0)
    for fragment in owned:
        counts[fragment.name] += fragment.numel
    totals = group.sum(torch.tensor(list(counts.values()), dtype=torch.float64)).tolist()
    for (name, numel), total in zip(numels.items(), totals, strict=True):
        if total != numel:
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} keeps its shards elsewhere than opd-ds knows: of {name!r} all "
                f"ranks together hold {total:.0f} elements instead of {numel}; {privates.REMEDY}"
            )


def in_memory(optimizer: Any, fragment: Fragment, *, write: bool) -> AbstractContextManager[None]:
    """Inside, master weights and moments of the fragment's flat tensor are in memory, also where they live on NVMe."""
    return privates.in_memory(optimizer, fragment.sub_group, write=write)


def moments(optimizer: Any, flat: Tensor) -> dict[str, Any]:
    """The inner optimizer's state of `flat`: tensors of its shape (Adam: `exp_avg`, `exp_avg_sq`) and numbers. Empty
    before its first step.

    Raises:
        UserError: the optimizer has state, but keeps it under other tensors.
    """
    inner = privates.inner_optimizer(optimizer)
    # Without ZeRO a parameter that never had a gradient has no state; a shard always has.
    if inner is not optimizer and inner.state and flat not in inner.state:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} keeps the optimizer's state elsewhere than opd-ds knows; "
            f"{privates.REMEDY}"
        )
    return inner.state.get(flat, {})
