"""Completing a DeepSpeed JSON: batch sizes and precision are ours; "auto" comes from the run and its network."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from opd_ds.cluster.world import World
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import OptimizerSection
from opd_ds.engine.privates import whole_shape
from opd_ds.errors import UserError

AUTO = "auto"
_LARGEST_BUCKET, _LARGEST_LIVE = 50_000_000, 1_000_000_000
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OWNED_BY = {
    "train_batch_size": "rollout.samples",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "rollout.samples and train.micro_batch",
}


def read_ds_config(path: Path) -> dict[str, Any]:
    """Parse a DeepSpeed JSON.

    Raises:
        UserError: not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"ds_config {path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(data, dict):
        raise UserError(f"ds_config {path}: needs an object at the top level")
    return data


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


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def parameters_on_nvme(ds_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed keeps the network's own weights on NVMe."""
    return ds_config.get("zero_optimization", {}).get("offload_param", {}).get("device", "none") == "nvme"


def student_ds_config(template: dict[str, Any], config: RunConfig, world: World, source: str) -> dict[str, Any]:
    """The student engine's ds_config.

    Raises:
        UserError: `template` sets what the run config owns, or both set an optimizer value and differ, or asks for a
            layout that does not fit the ranks or the precision.
    """
    ds = copy.deepcopy(template)
    _fill_batch_and_precision(ds, config.train.micro_batch, config.precision, world.size, source)
    if config.precision == "fp16" and zero_stage(ds) == 0:
        # Without ZeRO, DeepSpeed (0.19.8) divides gradients by the loss scale in `step` but multiplies by it nowhere.
        raise UserError(
            f"ds_config {source}: zero_optimization.stage = 0 with precision = 'fp16': DeepSpeed would scale gradients "
            "down to nothing; set deepspeed to zero1, zero2 or zero3, or precision to 'bf16'"
        )
    _fill_layout(ds, world, source)
    _fill_optimizer(ds, config.optimizer, source)
    _fill_schedule(ds, config, source)
    if ds.get("managed_gradient_accumulation", True) is not True:
        raise UserError(
            f"ds_config {source}: managed_gradient_accumulation must stay true; the trainer sets boundaries"
        )
    return ds


def frozen_ds_config(template: dict[str, Any], precision: str, world_size: int, source: str) -> dict[str, Any]:
    """The ds_config of a teacher engine: ZeRO stage 3 without an optimizer (ZeRO-Inference).

    Raises:
        UserError: another stage (DeepSpeed refuses 1 and 2 without an optimizer), or training keys.
    """
    ds = copy.deepcopy(template)
    if zero_stage(ds) != 3:
        raise UserError(f"ds_config {source}: zero_optimization.stage = {zero_stage(ds)}; a teacher engine needs 3")
    for key in ("optimizer", "scheduler", "gradient_clipping"):
        if key in ds:
            raise UserError(f"ds_config {source}: a teacher never trains; remove {key!r}")
    _fill_batch_and_precision(ds, 1, precision, world_size, source)
    return ds


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
                f'ds_config {source}: {key} = {ds[key]} is not taken from there; remove it (or write "auto") and set '
                f"{_OWNED_BY[key]} in the run config"
            )
    ds |= dict(zip(_BATCH_KEYS, (micro * world_size, micro, 1), strict=True))
    for name in ("fp16", "bf16"):
        block = ds.setdefault(name, {})
        wanted = precision == name
        if block.get("enabled", AUTO) not in (AUTO, wanted):
            raise UserError(
                f"ds_config {source}: {name}.enabled = {block['enabled']} contradicts precision = {precision!r}; "
                f'remove it (or write "auto") and set precision in the run config'
            )
        block["enabled"] = wanted
    if ds.get("torch_autocast", {}).get("enabled", False):
        raise UserError(f"ds_config {source}: torch_autocast is not supported; set precision in the run config")
    if precision == "bf16" and zero_stage(ds) > 0:
        # Many micro-batches add up in one gradient; in bf16 small ones would be rounded away. Stage 0 has no choice.
        ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _fill_layout(ds: dict[str, Any], world: World, source: str) -> None:
    """Where states and weights live. Hierarchical sharding (ZeRO++'s hpZ) gathers weights within a node; states stay
    sharded over all ranks.
    """
    zero = ds.get("zero_optimization", {})
    for key in ("mics_shard_size", "mics_hierarchical_params_gather"):
        if key in zero:
            raise UserError(
                f"ds_config {source}: zero_optimization.{key}: DeepSpeed has removed MiCS; use "
                f'zero_hpz_partition_size = "auto", as in ds_configs/zero3_hpz.json'
            )
    if zero.get("round_robin_gradients", False):
        # DeepSpeed 0.19.8 then names pieces of parameters wrongly (stage_1_and_2.py, _link_all_hp_params).
        raise UserError(f"ds_config {source}: zero_optimization.round_robin_gradients is not supported; remove it")
    if zero.get("offload_optimizer", {}).get("ratio", 1.0) != 1.0:
        raise UserError(f"ds_config {source}: offload_optimizer.ratio other than 1 is not supported; remove it")
    wanted = zero.get("zero_hpz_partition_size", 1)
    if wanted == AUTO:
        # On one node, or one process per node, there is nothing to gain.
        wanted = world.local_size if world.local_size < world.size else 1
    if wanted > 1 and zero_stage(ds) != 3:
        raise UserError(f"ds_config {source}: zero_hpz_partition_size = {wanted} needs stage 3, not {zero_stage(ds)}")
    if world.size % wanted:
        raise UserError(
            f"ds_config {source}: zero_hpz_partition_size = {wanted} does not divide the {world.size} ranks; give the "
            'number of processes per node, or "auto"'
        )
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = wanted


def _fill_optimizer(ds: dict[str, Any], wanted: OptimizerSection, source: str) -> None:
    block = ds.setdefault("optimizer", {"type": "AdamW", "params": {}})
    params = block.setdefault("params", {})
    if block.get("type") in ("Adam", "AdamW"):
        for name in ("lr", "betas", "eps", "weight_decay"):
            params.setdefault(name, AUTO)
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name in params:
            key = f"optimizer.params.{name}"
            params[name] = _settle(
                params[name], getattr(wanted, name), name in wanted.model_fields_set, key, name, source
            )
    clipping = ds.get("gradient_clipping", AUTO)
    given = "max_grad_norm" in wanted.model_fields_set
    ds["gradient_clipping"] = _settle(
        clipping, wanted.max_grad_norm, given, "gradient_clipping", "max_grad_norm", source
    )
    offloaded = ds.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if block.get("type") in ("Adam", "AdamW") and not offloaded:
        # DeepSpeed's own FusedAdam is compiled at first use; torch's needs no compiler and is as fast.
        params.setdefault("torch_adam", True)


def _settle(found: Any, wanted: Any, given: bool, ds_key: str, run_key: str, source: str) -> Any:
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted
    if found == AUTO:
        return wanted
    if given and found != wanted:
        raise UserError(
            f"ds_config {source}: {ds_key} = {found} and the run config's optimizer.{run_key} = {wanted} differ; "
            f'write "auto" in the one or remove the other'
        )
    return found


def _fill_schedule(ds: dict[str, Any], config: RunConfig, source: str) -> None:
    wanted = config.optimizer
    if wanted.warmup_rounds == 0 and wanted.schedule == "constant":
        return
    if "scheduler" in ds:
        raise UserError(
            f"ds_config {source}: has a scheduler and the run config sets optimizer.warmup_rounds or schedule; keep one"
        )
    steps = config.train.inner_epochs
    warmup = wanted.warmup_rounds * steps
    if wanted.schedule == "cosine":
        params: dict[str, Any] = {
            "total_num_steps": config.run.rounds * steps,
            "warmup_num_steps": max(warmup, 2),  # WarmupCosineLR takes no fewer
            "cos_min_ratio": 0.02,
        }
        ds["scheduler"] = {"type": "WarmupCosineLR", "params": params}
    else:
        lr = ds["optimizer"]["params"]["lr"]
        params = {"warmup_min_lr": 0.0, "warmup_max_lr": lr, "warmup_num_steps": warmup, "warmup_type": "linear"}
        ds["scheduler"] = {"type": "WarmupLR", "params": params}
