"""What a rank holds of the student in full precision: pieces of parameters, by name, at any ZeRO stage.

DeepSpeed has no public view of its shards that fits every stage, so the attributes below are those of 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor, nn


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
    optimizer = engine.optimizer
    if zero_stage == 3:
        return list(_of_stage_3(optimizer, names))
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1, 2; bf16 stage 1
        if hasattr(optimizer, attribute):
            return list(_of_stages_1_and_2(engine.module, getattr(optimizer, attribute)))
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in half precision
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return [
            Fragment(names[id(parameter)], 0, master.numel(), master, 0, group)
            for group, (ours, masters) in enumerate(pairs)
            for parameter, master in zip(ours, masters, strict=True)
        ]
    if hasattr(optimizer, "fp32_groups_flat"):  # the same with DeepSpeed's fused Adam
        return list(_of_flat_groups(optimizer.fp16_groups, optimizer.fp32_groups_flat, names))
    return [
        Fragment(names[id(parameter)], 0, parameter.numel(), parameter, 0, group)
        for group, settings in enumerate(optimizer.param_groups)
        for parameter in settings["params"]
    ]


def _of_stage_3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for index, parameters in enumerate(optimizer.fp16_groups):
        flat, offset = optimizer.fp32_partitioned_groups_flat[index], 0
        for parameter in parameters:
            share = parameter.partition_numel()  # the last rank's is filled up beyond the parameter's end
            start = share * optimizer._get_param_partition_rank(parameter)
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:
                group = optimizer.sub_group_to_group_id[index]
                yield Fragment(names[id(parameter)], start, numel, flat, offset, group, index)
            offset += share


def _of_stages_1_and_2(module: nn.Module, flats: list[Tensor]) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # frozen, or all of it on other ranks
            continue
        held, within = mapping.lp_fragment_address, mapping.hp_fragment_address
        group = mapping.param_group_index
        yield Fragment(name, held.start, held.numel, flats[group], within.start, group)


def _of_flat_groups(groups: list[list[Tensor]], flats: list[Tensor], names: dict[int, str]) -> Iterator[Fragment]:
    for group, (parameters, flat) in enumerate(zip(groups, flats, strict=True)):
        offset = 0
        for parameter in parameters:
            yield Fragment(names[id(parameter)], 0, parameter.numel(), flat, offset, group)
            offset += parameter.numel()


@contextmanager
def in_memory(optimizer: Any, fragment: Fragment, *, write: bool) -> Iterator[None]:
    """Inside, master weights and moments of the fragment's flat tensor are in memory, also where they live on NVMe."""
    index = fragment.sub_group
    if index is None or not optimizer._swappable_optimizer_subgroup(index):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if write:
            optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            optimizer._release_swap_buffers(index)


def moments(optimizer: Any, flat: Tensor) -> dict[str, Any]:
    """The inner optimizer's state of `flat`: tensors of its shape (Adam: `exp_avg`, `exp_avg_sq`) and numbers. Empty
    before its first step.
    """
    return inner_optimizer(optimizer).state.get(flat, {})


def inner_optimizer(optimizer: Any) -> Any:
    """The torch-style optimizer inside DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)
