"""Completing a DeepSpeed JSON: batch sizes and precision are ours; "auto" comes from the run and its network."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from torch import nn

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.engine.ds_components import fill_optimizer, fill_scheduler, settle
from opd_ds.engine.ds_settings import AUTO, check_ds_config, zero_stage
from opd_ds.engine.privates import whole_shape
from opd_ds.errors import UserError

_LARGEST_BUCKET, _LARGEST_LIVE = 50_000_000, 1_000_000_000
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OWNED_BY = {
    "train_batch_size": "rollout.samples",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "rollout.samples and train.micro_batch",
}


@dataclass(frozen=True)
class NetworkSizes:
    """Elements of a network: of all its parameters, of the trained ones, of the largest of all and of the trained."""

    parameters: int
    trained: int
    largest: int
    largest_trained: int

    @staticmethod
    def of(network: nn.Module) -> NetworkSizes:
        """Of a whole network, also on meta, or of one that DeepSpeed has partitioned."""
        sizes = [(math.prod(whole_shape(value)), value.requires_grad) for value in network.parameters()]
        trained = [size for size, is_trained in sizes if is_trained]
        return NetworkSizes(
            sum(size for size, _ in sizes), sum(trained), max(size for size, _ in sizes), max(trained, default=0)
        )


def fill_sizes(ds_config: dict[str, Any], sizes: NetworkSizes) -> dict[str, Any]:
    """A copy of `ds_config` with its "auto" sizes in elements of this network; numbers stand.

    DeepSpeed's own defaults, 5e8 and 1e9 elements, are allocated or kept whole however small the network is. Here
    buckets are an eighth of what goes through them, at most 5e7 (which no link takes notice of any more) and at least
    the largest parameter; weights stay gathered from forward to backward where they are used again within a quarter of
    the network, at most 1e9.
    """

    def bucket(elements: int, largest: int) -> int:
        return max(min(elements // 8, _LARGEST_BUCKET), largest)

    reduced, gathered = bucket(sizes.trained, sizes.largest_trained), bucket(sizes.parameters, sizes.largest)
    live = max(min(sizes.parameters // 4, _LARGEST_LIVE), gathered)
    wanted = {
        "reduce_bucket_size": reduced,
        "sub_group_size": reduced,  # updated at once by the optimizer
        "stage3_prefetch_bucket_size": gathered,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }
    ds = copy.deepcopy(ds_config)
    zero = ds.get("zero_optimization", {})
    zero |= {key: value for key, value in wanted.items() if zero.get(key) == AUTO}
    swapped = zero.get("offload_param", {})
    if swapped.get("buffer_size") == AUTO:
        swapped["buffer_size"] = sizes.largest
    return ds


def parameters_on_nvme(ds_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed keeps the network's own weights on NVMe."""
    return ds_config.get("zero_optimization", {}).get("offload_param", {}).get("device", "none") == "nvme"


def student_ds_config(template: dict[str, Any], config: RunConfig, world: World, source: str) -> dict[str, Any]:
    """The student engine's ds_config, complete but for the sizes of the network. Starts nothing.

    Raises:
        UserError: as `check_ds_config`; or `template` sets what the run config owns, or both set an optimizer value and
            differ, or it asks for a layout that does not fit the ranks or the precision.
    """
    source = f"ds_config {source}"
    ds = check_ds_config(template, source)
    _fill_batch_and_precision(ds, config.train.micro_batch, config.precision, world.size, source)
    if config.precision == "fp16" and zero_stage(ds) == 0:
        # Without ZeRO, DeepSpeed (0.19.8) divides gradients by the loss scale in `step` but multiplies by it nowhere.
        raise UserError(
            f"{source}: zero_optimization.stage = 0 with precision = 'fp16': DeepSpeed would scale gradients "
            "down to nothing; set deepspeed to zero1, zero2 or zero3, or precision to 'bf16'"
        )
    if config.student.quantize is not None and zero_stage(ds) == 3:
        raise UserError(
            f"{source}: zero_optimization.stage = 3 with student.quantize = {config.student.quantize!r}: quantized "
            "weights cannot be sharded; set deepspeed to zero1 or zero2, or remove student.quantize"
        )
    _fill_layout(ds, world, source)
    wanted = config.optimizer
    fill_optimizer(ds, wanted, source)
    clipping, given = ds.get("gradient_clipping", AUTO), "max_grad_norm" in wanted.model_fields_set
    ds["gradient_clipping"] = settle(
        clipping, wanted.max_grad_norm, given, "gradient_clipping", "max_grad_norm", source
    )
    if "scheduler" in ds:
        fill_scheduler(ds, config, source)
    _ask_deepspeed(ds, source)
    return ds


def frozen_ds_config(template: dict[str, Any], precision: str, world_size: int, source: str) -> dict[str, Any]:
    """The ds_config of a teacher engine: ZeRO stage 3 without an optimizer (ZeRO-Inference).

    Raises:
        UserError: as `check_ds_config`; another stage (DeepSpeed refuses 1 and 2 without an optimizer), or training
            keys.
    """
    source = f"ds_config {source}"
    ds = check_ds_config(template, source)
    if zero_stage(ds) != 3:
        raise UserError(f"{source}: zero_optimization.stage = {zero_stage(ds)}; a teacher engine needs 3")
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        if key in ds:
            raise UserError(f"{source}: a teacher never trains; remove {key!r}")
    _check_offload(ds, source)
    if ds["zero_optimization"].get("zero_hpz_partition_size") == AUTO:
        del ds["zero_optimization"]["zero_hpz_partition_size"]  # over all ranks
    _fill_batch_and_precision(ds, 1, precision, world_size, source)
    _ask_deepspeed(ds, source)
    return ds


def _ask_deepspeed(ds: dict[str, Any], source: str) -> None:
    """Let DeepSpeed read the whole, for what its blocks forbid each other. Batch sizes are left to it: it would compare
    them with the processes that have met so far.
    """
    batch = {key: value for key, value in ds.items() if key not in _BATCH_KEYS}
    try:
        DeepSpeedConfig(batch | {"train_micro_batch_size_per_gpu": 1})
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error


def swapped_apart(ds_config: dict[str, Any], name: str) -> dict[str, Any]:
    """The ds_config with a folder of its own for what is swapped to NVMe: DeepSpeed (0.19.8,
    partitioned_param_swapper.py) empties the folder when it makes an engine, whatever another engine has there.
    """
    ds = copy.deepcopy(ds_config)
    for block in ("offload_param", "offload_optimizer"):
        swapped = ds.get("zero_optimization", {}).get(block, {})
        if swapped.get("device") == "nvme" and "nvme_path" in swapped:
            swapped["nvme_path"] = str(Path(swapped["nvme_path"]) / name)
    return ds


def _fill_batch_and_precision(ds: dict[str, Any], micro: int, precision: str, world_size: int, source: str) -> None:
    # DeepSpeed's own measure of throughput waits for the device at every forward.
    ds.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    for key in _BATCH_KEYS:
        if ds.get(key, AUTO) != AUTO:
            raise UserError(
                f'{source}: {key} = {ds[key]} is not taken from there; remove it (or write "auto") and set '
                f"{_OWNED_BY[key]} in the run config"
            )
    ds |= dict(zip(_BATCH_KEYS, (micro * world_size, micro, 1), strict=True))
    for name in ("fp16", "bf16"):
        block = ds.setdefault(name, {})
        wanted = precision == name
        if block.get("enabled", AUTO) not in (AUTO, wanted):
            raise UserError(
                f"{source}: {name}.enabled = {block['enabled']} contradicts precision = {precision!r}; "
                f'remove it (or write "auto") and set precision in the run config'
            )
        block["enabled"] = wanted
    if precision == "bf16" and zero_stage(ds) > 0:
        # Many micro-batches add up in one gradient; in bf16 small ones would be rounded away. Stage 0 has no choice.
        ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    added_in = ds.get("data_types", {}).get("grad_accum_dtype", precision)
    possible = {precision, "fp32"} if zero_stage(ds) > 0 else {precision}
    if added_in not in possible:
        raise UserError(
            f"{source}: data_types.grad_accum_dtype = {added_in!r} at stage {zero_stage(ds)} with precision = "
            f"{precision!r}: allowed are {', '.join(sorted(possible))}"
        )


def _fill_layout(ds: dict[str, Any], world: World, source: str) -> None:
    """Where states and weights live. Hierarchical sharding (ZeRO++'s hpZ) gathers weights within a node; states stay
    sharded over all ranks.
    """
    zero = ds.get("zero_optimization", {})
    _check_offload(ds, source)
    wanted = zero.get("zero_hpz_partition_size", 1)
    if wanted == AUTO:
        # On one node, or one process per node, there is nothing to gain.
        wanted = world.local_size if world.local_size < world.size else 1
    wanted = max(wanted, 1)
    if wanted > 1 and zero_stage(ds) != 3:
        raise UserError(f"{source}: zero_hpz_partition_size = {wanted} needs stage 3, not {zero_stage(ds)}")
    if world.size % wanted:
        raise UserError(
            f"{source}: zero_hpz_partition_size = {wanted} does not divide the {world.size} ranks; give the "
            'number of processes per node, or "auto"'
        )
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = wanted


def _check_offload(ds: dict[str, Any], source: str) -> None:
    """Refuse an offload that DeepSpeed (0.19.8) would leave out in silence or fail with."""
    stage, zero = zero_stage(ds), ds.get("zero_optimization", {})
    for name, lowest in (("offload_param", 3), ("offload_optimizer", 1)):
        block = zero.get(name, {})
        device = block.get("device", "none")
        needed = 3 if device == "nvme" else lowest
        if device != "none" and stage < needed:
            raise UserError(f"{source}: zero_optimization.{name}.device = {device!r} needs stage {needed}, not {stage}")
        if device == "nvme" and "nvme_path" not in block:
            raise UserError(f"{source}: zero_optimization.{name}.nvme_path: required and missing with device 'nvme'")
