"""What is private in DeepSpeed and used here: every attribute is in this file, with its reason.

All were read in DeepSpeed 0.19.6 to 0.19.8. DeepSpeed's public view of its shards (`deepspeed.utils.safe_get_local_*`)
knows stage 3 only and gives a copy where the optimizer is offloaded; `safe_get_full_*` knows stages 1 to 3 and is a
collective that makes every parameter whole. Checkpoints, averages and earlier policies need the shards themselves, at
every stage and without communication. An attribute that a later version renames ends the start of a run with a
message; `fragments.check_cover` finds what a changed meaning would leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from opd_ds.errors import UserError

REMEDY = "install deepspeed>=0.19.6,<=0.19.8, for which this opd-ds was written"


def private(owner: Any, name: str) -> Any:
    """An attribute that DeepSpeed does not document.

    Raises:
        UserError: this version of DeepSpeed does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__}: {type(owner).__name__} has no {name!r}, without which opd-ds cannot "
            f"gather, save and average weights; {REMEDY}"
        ) from error


# ---- parameters under ZeRO-3: `deepspeed.zero` documents how to gather them, not what they say of themselves ----


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; the parameter itself is empty while it is sharded."""
    return int(private(parameter, "ds_numel"))


def whole_shape(parameter: nn.Parameter) -> list[int]:
    """The shape of the whole parameter, at any stage: only ZeRO-3 gives parameters a shape of its own."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def is_gathered(parameter: nn.Parameter) -> bool:
    """Whether the parameter is whole on this rank now, as small ("persistent") ones always are."""
    return bool(private(parameter, "ds_status").name == "AVAILABLE")


# ---- parameters sharded before `deepspeed.initialize`: `zero.Init` documents how to convert whole modules ----


def shard_parameter(init: deepspeed.zero.Init, parameter: nn.Parameter) -> None:
    """Make `parameter` one of ZeRO-3, whole so far; `Init` itself would broadcast it from rank 0 at the same time."""
    private(init, "_convert_to_deepspeed_param")(parameter)


def parts_to_hold(init: deepspeed.zero.Init, parameter: nn.Parameter) -> Iterator[tuple[int, int]]:
    """(first element, end) of what this rank will hold of a parameter of `shard_parameter`; hpZ holds a second part."""
    parts = [(private(parameter, "ds_zero_partition_rank"), private(parameter, "ds_zero_partition_world_size"))]
    if private(parameter, "ds_zero_param_process_group") is not None:
        parts.append((private(init, "rank_in_group"), private(parameter, "ds_secondary_tensor_group_size")))
    for rank, ranks in parts:
        size = private(parameter, "aligned_size")() // ranks
        yield rank * size, min((rank + 1) * size, whole_numel(parameter))


def keep_own_parts(init: deepspeed.zero.Init, parameter: nn.Parameter) -> None:
    """Copy them to where they live and let go of the rest; the parameter is gathered on the device from now on."""
    private(parameter, "partition")()
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=device_of(init))


def device_of(init: deepspeed.zero.Init) -> torch.device:
    """Where parameters are gathered."""
    return private(init, "local_device")


def hpz_group() -> Any:
    """The ranks among which hpZ gathers, or None where there is none so far; it may be made only once in a process."""
    return private(deepspeed.utils.groups, "_get_zero_param_intra_parallel_group")()


def module_hooks(engine: Any) -> list[Any]:
    """Handles of the hooks by which ZeRO-3 gathers and releases weights, of all modules; without an optimizer it is the
    "optimizer" that has them.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    return [*private(offload, "forward_hooks"), *private(offload, "backward_hooks")]


# ---- where the fp32 masters are ----


def stage_3_groups(optimizer: Any) -> Iterator[tuple[int, int, Tensor, list[nn.Parameter]]]:
    """Per flat tensor of masters: its number, its param group, itself, and the parameters whose shards it holds."""
    flats = private(optimizer, "fp32_partitioned_groups_flat")
    group_of = private(optimizer, "sub_group_to_group_id")
    for index, parameters in enumerate(private(optimizer, "fp16_groups")):
        yield index, group_of[index], flats[index], parameters


def stage_3_share(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Where this rank's shard begins in the flattened parameter, and its elements; the last rank's is padded."""
    numel = private(parameter, "partition_numel")()
    return numel * private(optimizer, "_get_param_partition_rank")(parameter), numel


def sharded_flats(optimizer: Any) -> list[Tensor]:
    """Per param group, this rank's part of the masters at stages 1 and 2."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16 has an optimizer of its own
        return optimizer.fp32_groups_flat_partition
    return private(optimizer, "single_partition_of_fp32_groups")


def sharded_address(parameter: nn.Parameter) -> tuple[int, int, int, int] | None:
    """Of what this rank holds of a trainable parameter at stages 1 and 2: first element, elements, where it begins in
    the flat tensor, and the param group. None where all of it is on other ranks.
    """
    mapping = private(parameter, "_hp_mapping")
    if mapping is None:
        return None
    held, within = private(mapping, "lp_fragment_address"), private(mapping, "hp_fragment_address")
    return held.start, held.numel, within.start, private(mapping, "param_group_index")


def plain_groups(optimizer: Any) -> Iterator[tuple[int, list[nn.Parameter], list[Tensor] | Tensor]]:
    """Per param group at stage 0: the parameters, and their masters (in fp32 the parameters themselves), one by one or
    (with DeepSpeed's fused Adam) as one flat tensor.
    """
    if optimizer is inner_optimizer(optimizer):  # fp32: DeepSpeed wraps nothing
        for group, settings in enumerate(optimizer.param_groups):
            yield group, settings["params"], settings["params"]
        return
    masters = optimizer.fp32_groups if hasattr(optimizer, "fp32_groups") else private(optimizer, "fp32_groups_flat")
    for group, parameters in enumerate(private(optimizer, "fp16_groups")):
        yield group, parameters, masters[group]


def inner_optimizer(optimizer: Any) -> Any:
    """The torch-style optimizer inside DeepSpeed's, which keeps the moments."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def in_memory(optimizer: Any, sub_group: int | None, *, write: bool) -> Iterator[None]:
    """Inside, masters and moments of one flat tensor are in memory, also where they live on NVMe (stage 3 only)."""
    if sub_group is None or not private(optimizer, "_swappable_optimizer_subgroup")(sub_group):
        yield
        return
    private(optimizer, "_optimizer_states_and_gradient_swap_in")(sub_group)
    try:
        yield
    finally:
        if write:
            private(optimizer, "_optimizer_states_and_gradient_swap_out")(sub_group)
        else:
            private(optimizer, "_release_swap_buffers")(sub_group)


# ---- from the masters to the network, as at the end of a step, of which there is no public half ----


def publish_stage_3(optimizer: Any) -> None:
    """Collective."""
    for index, *_ in stage_3_groups(optimizer):
        private(optimizer, "_reassign_or_swap_out_partitioned_parameters")(index)
    private(optimizer, "invalidate_secondary_tensor")()  # hpZ keeps a copy of the weights per node
    # Small ("persistent") parameters stay gathered after a step, and what is gathered is not gathered again.
    private(optimizer, "_partition_all_parameters")()
    persistent = private(optimizer, "persistent_parameters")
    if persistent:
        persistent[0].all_gather(persistent)


def publish_stages_1_and_2(optimizer: Any) -> None:
    """Collective."""
    private(optimizer, "update_lp_params")()


# ---- counters and the loss scale: public by name, documented nowhere ----

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, int]:
    """What the engine counts."""
    return {name: private(engine, name) for name in _COUNTERS}


def set_counters(engine: Any, saved: dict[str, int]) -> None:
    for name, value in saved.items():
        setattr(engine, name, value)


def loss_scale(engine: Any) -> dict[str, Any]:
    """The state of fp16's loss scale; of no importance in other precisions."""
    scaler = _loss_scaler(engine)
    found = {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}
    if engine.fp16_enabled() and "cur_scale" not in found:
        private(scaler, "cur_scale")
    return found


def set_loss_scale(engine: Any, saved: dict[str, Any]) -> None:
    scaler = _loss_scaler(engine)
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _loss_scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


# ---- communication ----


def counted_messages() -> dict[str, dict[int, list[Any]]]:
    """What DeepSpeed's comms logger has seen: collective -> bytes -> [count, ...]. In public it only prints a table."""
    return private(private(deepspeed.comm.comm, "comms_logger"), "comms_dict")


def leave_out_shm_op() -> None:
    """On CPUs deepspeed/comm/torch.py (0.19) compiles an op for the all-reduce of its inference engine, which nothing
    here uses: a minute of the first start, a compiler, and 66 MiB of shared memory per rank that no one ever unlinks.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
