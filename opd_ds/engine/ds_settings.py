"""What a ds_config may hold: every key, its type and its owner, checked as soon as the file is read.

DeepSpeed (0.19.8) ignores a top-level key that it does not know, takes "auto" for "not given" in most places, and meets
a wrong type where it first computes with it, when all models are loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from opd_ds.config.files import merged
from opd_ds.errors import UserError, nearest
from opd_ds.utils.nested import flat

AUTO = "auto"


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Optimizer(_Block):
    type: str
    params: dict[str, Any] = Field(default_factory=dict)
    legacy_fusion: bool = False


class _Scheduler(_Block):
    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class _Timers(_Block):
    throughput: DeepSpeedThroughputTimerConfig | None = None


class _DataTypes(_Block):
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None


class _Aio(_Block):
    block_size: PositiveInt | None = None
    queue_depth: PositiveInt | None = None
    intra_op_parallelism: PositiveInt | None = None
    single_submit: bool | None = None
    overlap_events: bool | None = None
    use_gds: bool | None = None


_DtypeName = Annotated[
    Literal["fp32", "fp16", "bf16"], BeforeValidator(lambda name: name.lower() if isinstance(name, str) else name)
]


class DsSettings(_Block):
    """The keys that a run reads. Batch sizes and precision may stand there as "auto" or as the run config has them."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    zero_optimization: DeepSpeedZeroConfig | None = None
    fp16: DeepSpeedFP16Config | None = None
    bf16: DeepSpeedBF16Config | None = None
    data_types: _DataTypes | None = None
    optimizer: _Optimizer | None = None
    scheduler: _Scheduler | None = None
    gradient_clipping: NonNegativeFloat | None = None
    aio: _Aio | None = None
    timers: _Timers | None = None
    steps_per_print: PositiveInt | None = None
    communication_data_type: _DtypeName | None = None
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None
    disable_python_gc: bool | None = None


_LOGS = "the run writes metrics.jsonl and TensorBoard into run.output_dir"
_TIMES = "the times of a round's phases are in metrics.jsonl"
_CHECKPOINTS = "set run.checkpoint_every and its neighbours in the run config"
_PROMPTS = "prompts come from tasks.<name>.prompts of the run config"
_PRECISION = "set precision in the run config"
_PARALLEL = "ranks are data-parallel only"
_MASTERS = "checkpoints and averages need masters in fp32"
_DENSE = "networks are trained dense and in their own precision"
_HPZ = 'DeepSpeed has removed it; for sharding within a node: zero_hpz_partition_size = "auto"'
# Keys of DeepSpeed that have no place in a run, and what to do instead. Switched off they are left out.
ELSEWHERE = {
    "tensorboard": _LOGS,
    "wandb": "set trackers in the run config",
    "comet": "set trackers in the run config",
    "csv_monitor": _LOGS,
    "comms_logger": _TIMES,
    "wall_clock_breakdown": _TIMES,
    "memory_breakdown": "`opd-ds plan` says what a run needs in each phase",
    "flops_profiler": "`opd-ds plan` counts the operations of a run",
    "autotuning": "it ends the process after some steps; `opd-ds plan` says what fits",
    "dump_state": "`opd-ds train --dry-run` prints the ds_config",
    "log_level": "DeepSpeed's warnings are shown, and nothing below",
    "activation_checkpointing": "set student.gradient_checkpointing in the run config",
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "compile": "set model.compile_blocks in the run config",
    "hybrid_engine": "it is for language models; rollouts follow rollout.gather of the run config",
    "elasticity": "a checkpoint resumes on any number of ranks as it is",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "data_efficiency": _PROMPTS,
    "curriculum_learning": _PROMPTS,
    "dataloader_drop_last": _PROMPTS,
    "vocabulary_size": _PROMPTS,
    "bfloat16": 'write "bf16"',
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "weight_quantization": _DENSE,
    "compression_training": _DENSE,
    "quantize_training": _DENSE,
    "eigenvalue": _DENSE,
    "sparse_attention": _DENSE,
    "sparse_gradients": _DENSE,
    "progressive_layer_drop": _DENSE,
    "graph_harvesting": "DeepSpeed has removed it",
    "disable_allgather": "remove it",
    "prescale_gradients": "gradients are averaged over the ranks",
    "zero3_init_flag": "it is accelerate's; weights are always read in shards under ZeRO-3",
    "zero3_save_16bit_model": "it is accelerate's; the run exports the whole model at its end",
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "data_types.keep_in_fp32_modules": _PRECISION,
    "zero_optimization.mics_shard_size": _HPZ,
    "zero_optimization.mics_hierarchical_params_gather": _HPZ,
    "zero_optimization.zeropp_loco_param": "DeepSpeed has removed it",
    # DeepSpeed 0.19.8 then names pieces of parameters wrongly (stage_1_and_2.py, _link_all_hp_params).
    "zero_optimization.round_robin_gradients": "remove it",
    "zero_optimization.zenflow": "some updates would come late",
    "zero_optimization.leaf_module": "blocks of the network are gathered as units anyway",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.legacy_stage1": "remove it",
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'write "pin_memory" in the offload block',
    "zero_optimization.offload_optimizer.super_offload": "remove it",
}
# Keys that may have one value only, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, "the trainer sets the boundaries"),
    "gradient_allreduce_op": ("mean", "the loss is already the part of a mean"),
    "gradient_predivide_factor": (1.0, "gradients are averaged over the ranks"),
    "zero_optimization.compute_grad_norm": (True, "the run logs the norm and stops where it is not finite"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "checkpoints know optimizers that are offloaded as a whole"),
}
# Where "auto" must not come to mean DeepSpeed's default, which is to shard and offload nothing.
_DECIDED = ("zero_optimization", "offload_optimizer", "offload_param", "stage", "device", "nvme_path", "type")
# Where "auto" waits for the run config or for the sizes of the network.
FILLED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.offload_param.buffer_size",
}
_FREE = ("optimizer.params", "scheduler.params")


def read_ds_config(path: Path) -> dict[str, Any]:
    """Parse and check a DeepSpeed JSON. In what it returns all values have their types, and keys that are null or
    switched off are left out.

    Raises:
        UserError: not JSON, or as `check_ds_config`.
    """
    source = f"ds_config {path}"
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source}, line {error.lineno}: not JSON ({error.msg}); it has no comments and no trailing commas"
        ) from error
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{source}: not JSON ({error})") from error
    return check_ds_config(data, source)


def check_ds_config(data: Any, source: str) -> dict[str, Any]:
    """The same settings in their types, without what is null or switched off; "auto" stands where it is filled later.

    Args:
        source: begins the message.

    Raises:
        UserError: an unknown key, with the nearest one; a key that belongs elsewhere; a value of a wrong type.
    """
    if not isinstance(data, dict):
        raise UserError(f'{source}: needs an object at the top level, such as {{"zero_optimization": ...}}')
    data = _without_others(data, source)
    unknown = [_unknown(path) for path in _unknown_keys(data, DsSettings)]
    if unknown:
        raise UserError(f"{source}: {'; '.join(unknown[:3])}")
    autos: dict[str, Any] = {}
    plain = _without_autos(data, source, autos)
    try:
        settings = DsSettings.model_validate(plain)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error.errors()[0])}") from error
    checked = settings.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    for path, value in flat(plain).items():
        if isinstance(value, bool) and not isinstance(_at(checked, path), bool | None):
            raise UserError(f"{source}: {path} = {_shown(value)}: needs a number")
    return merged(checked, autos)


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Of a ds_config, complete or not."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _without_others(data: dict[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """Without nulls and what is switched off or fixed; what is not is refused."""
    kept = {}
    for key, value in data.items():
        path = prefix + key
        if path in ELSEWHERE:
            enabled = value.get("enabled", True) if isinstance(value, dict) else value
            if value and enabled not in (False, AUTO):
                raise UserError(f"{source}: {path} is not supported here: {ELSEWHERE[path]}")
        elif path in FIXED:
            only, why = FIXED[path]
            if value not in (None, AUTO, only):
                raise UserError(f"{source}: {path} = {_shown(value)}: only {_shown(only)} is supported: {why}")
        elif value is None and path != "zero_optimization.stage":
            continue
        elif isinstance(value, dict) and path not in _FREE:
            kept[key] = _without_others(value, source, f"{path}.")
        else:
            kept[key] = value
    return kept


def _unknown_keys(data: dict[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    blocks = _blocks(model)
    for key, value in data.items():
        if key not in blocks:
            yield prefix + key
        elif isinstance(value, dict) and (block := blocks[key]) is not None:
            yield from _unknown_keys(value, block, f"{prefix}{key}.")


def _unknown(path: str) -> str:
    *parents, key = path.split(".")
    model: type[BaseModel] = DsSettings
    for parent in parents:
        model = _blocks(model)[parent] or model
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    prefix = "".join(f"{parent}." for parent in parents)
    similar = nearest(snake, [*_blocks(model), *(k.removeprefix(prefix) for k in ELSEWHERE if k.startswith(prefix))])
    elsewhere = {name: where for where, name in _all_keys(DsSettings) if name == snake}
    if elsewhere and snake not in similar:
        similar = f" It belongs into {elsewhere[snake]!r}."
    return f"unknown key {path!r}, which DeepSpeed would ignore.{similar or ' Remove it.'}"


def _blocks(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The keys of a block; those that are blocks themselves with their models."""
    found: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        inner = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        for key in {name, field.alias or name}:
            found[key] = inner[0] if inner else None
    return found


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _parts(argument)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(block, key) of all blocks within `model`."""
    for key, inner in _blocks(model).items():
        if prefix:
            yield prefix, key
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}.{key}" if prefix else key)


def _without_autos(data: dict[str, Any], source: str, autos: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without "auto"; `autos` gets those that are filled later. Elsewhere it is DeepSpeed's default."""
    kept = {}
    for key, value in data.items():
        path = prefix + key
        if isinstance(value, dict) and path not in _FREE:
            inner: dict[str, Any] = {}
            kept[key] = _without_autos(value, source, inner, f"{path}.")
            if inner:
                autos[key] = inner
        elif value != AUTO or path == "optimizer.type":
            kept[key] = value
        elif key in _DECIDED:
            raise UserError(
                f'{source}: {path} = "auto": decide it; "auto" is for sizes and for what the run config has'
            )
        elif path in FILLED:
            autos[key] = AUTO
    return kept


def _explain(problem: Any) -> str:
    key, value = ".".join(str(part) for part in problem["loc"]), problem["input"]
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "missing":
        return f"{key}: required and missing"
    if problem["type"] in ("model_type", "dict_type", "model_attributes_type"):
        example = ' such as {"stage": 2}' if key == "zero_optimization" else ""
        message = f"needs an object{example}"
    if problem["type"] == "enum":
        allowed = dict.fromkeys(re.findall(r"\w+", problem["ctx"]["expected"].replace(" or ", " ")))
        message = f"allowed are {', '.join(allowed)}"
    shown = "" if isinstance(value, dict | BaseModel) else f" = {_shown(value)}"
    return f"{key}{shown}: {message}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data
