"""Optimizer and scheduler of a ds_config: which there are, what each takes, and the run's values in it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils import logger as deepspeed_logger
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError

from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import Beta, OptimizerSection
from opd_ds.engine.ds_settings import AUTO, zero_stage
from opd_ds.engine.moments import by_muon
from opd_ds.errors import UserError, nearest

_ADAMS = ("Adam", "AdamW")
_EIGHT_BITS = "AdamW8bit"  # of bitsandbytes, which DeepSpeed does not know by name
# What DeepSpeed (0.19.8, engine.py, _configure_basic_optimizer) builds by these names, on the device and where the
# optimizer is offloaded. Those of torch are the ones whose whole state checkpoints carry.
_OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "Adam": (FusedAdam, DeepSpeedCPUAdam),
    "AdamW": (FusedAdam, DeepSpeedCPUAdam),
    "Adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    "Lamb": (FusedLamb, FusedLamb),
    "Lion": (FusedLion, DeepSpeedCPULion),
    "Muon": (None, None),
    **{
        name: (getattr(torch.optim, name), getattr(torch.optim, name))
        for name in ("SGD", "RMSprop", "RAdam", "Adamax", "Adadelta", "Adafactor")
    },
    _EIGHT_BITS: (None, None),
}
_MUON_TAKES = {"lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "muon_lr", "adam_lr"}
_ADAM_CHOICES = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # which Adam; read before it is made
_NOT_PARAMS = {"self", "params", "model_params", "adamw_mode", "max_grad_norm"}
_RUN_VALUES = ("lr", "betas", "eps", "weight_decay")
_RATES = ("lr", "muon_lr", "adam_lr")
_FIXED_BITS = {"optim_bits", "args", "amsgrad", "percentile_clipping", "block_wise", "is_paged"}
# By type, the value of a scheduler that is the run's learning rate.
_PEAK_OF = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "WarmupCosineLR": None,
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}


class _Params(BaseModel):
    """Types of what several optimizers take; what only one takes is its own business."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    lr: PositiveFloat | None = None
    muon_lr: PositiveFloat | None = None
    adam_lr: PositiveFloat | None = None
    betas: tuple[Beta, Beta] | None = None
    eps: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    momentum: float | None = Field(None, ge=0, lt=1)
    torch_adam: bool | None = None
    adam_w_mode: bool | None = None
    fp32_optimizer_states: bool | None = None


def fill_optimizer(ds: dict[str, Any], wanted: OptimizerSection, source: str) -> None:
    """Complete the optimizer of a checked ds_config in place: "auto" and what is missing come from the run config.

    Every optimizer gets the run's learning rate. Adams get all of `betas`, `eps` and `weight_decay`, others those that
    the run config sets.

    Raises:
        UserError: an unknown type or parameter, or one that the run config sets to another value; an optimizer that is
            not installed, or that does not go with the stage.
    """
    block = ds.setdefault("optimizer", {"type": AUTO})
    named = block["type"] if block["type"] == AUTO else _named(block["type"], _OPTIMIZERS, f"{source}: optimizer.type")
    given = wanted.type is not None
    kind = block["type"] = settle(named, wanted.type or "AdamW", given, "optimizer.type", "type", source)
    found = {name: value for name, value in block.get("params", {}).items() if value is not None}
    params = _typed({name: value for name, value in found.items() if value != AUTO}, source)
    offloaded = _offloads(ds)
    if kind in (*_ADAMS, "Muon") and not offloaded:
        # DeepSpeed's own FusedAdam is compiled at first use; torch's needs no compiler and is as fast.
        params.setdefault("torch_adam", True)
    made = torch.optim.AdamW if kind in _ADAMS and params.get("torch_adam") else _OPTIMIZERS[kind][offloaded]
    if kind == _EIGHT_BITS:
        made = _eight_bits(source)
        ds["zero_allow_untested_optimizer"] = True  # it is tested here
    takes = _taken(kind, made)
    if named == AUTO:  # it stands for what the type has of the run's values
        found = {name: value for name, value in found.items() if name in takes or value != AUTO}
    for name in found.keys() - takes:
        remedy = " Set optimizer.max_grad_norm in the run config." if name == "max_grad_norm" else nearest(name, takes)
        raise UserError(f"{source}: optimizer.params.{name}: {kind} has no such parameter.{remedy or ' Remove it.'}")
    for name in _RUN_VALUES:
        given, value = name in wanted.model_fields_set, getattr(wanted, name)
        if name not in takes and given:
            raise UserError(f"{source}: optimizer.type = {kind!r} has no {name}; remove optimizer.{name} = {value}")
        if name in takes and (name == "lr" or kind in (*_ADAMS, _EIGHT_BITS) or given):
            found.setdefault(name, AUTO)
    for name, value in found.items():
        key = "lr" if name in _RATES else name
        if key in _RUN_VALUES:
            given = key in wanted.model_fields_set
            now = AUTO if value == AUTO else params[name]
            params[name] = settle(now, getattr(wanted, key), given, f"optimizer.params.{name}", key, source)
        elif value == AUTO:
            raise UserError(f'{source}: optimizer.params.{name} = "auto": the run config has no such value; remove it')
    block["params"] = params
    if made is not None and made.__module__.startswith(("torch.optim", "bitsandbytes")):
        with _explained(f"{source}: optimizer"):
            made([torch.zeros(1)], **{name: value for name, value in params.items() if name not in _ADAM_CHOICES})
    _check_zero(ds, kind, made, source)


def _check_zero(ds: dict[str, Any], kind: str, made: Any, source: str) -> None:
    stage = zero_stage(ds)
    if kind == "Adafactor" and stage > 0:
        raise UserError(
            f"{source}: optimizer.type = 'Adafactor' with ZeRO stage {stage}: it needs rows and columns, and ZeRO "
            "flattens the weights; set deepspeed to zero0, or the type to 'AdamW8bit'"
        )
    untested = made is not None and made not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS
    if untested and stage > 0 and not ds.get("zero_allow_untested_optimizer", False):
        raise UserError(
            f"{source}: optimizer.type = {kind!r}: DeepSpeed has not tested it with ZeRO; write "
            '"zero_allow_untested_optimizer": true to use it all the same, or choose another'
        )
    if kind == _EIGHT_BITS and _offloads(ds):
        raise UserError(
            f"{source}: optimizer.type = {kind!r} is computed on the device; remove zero_optimization."
            "offload_optimizer, or set the type to 'AdamW'"
        )
    if kind == "Muon" and (stage == 2 or (stage == 1 and not ds["bf16"]["enabled"])):
        raise UserError(
            f"{source}: optimizer.type = 'Muon' with ZeRO stage {stage}: DeepSpeed keeps its momentum there in another "
            "layout than the masters, which no checkpoint here carries; set the stage to 0 or 3, or to 1 with "
            "precision bf16"
        )
    if kind == "Muon" and stage == 3 and ds["zero_optimization"].setdefault("reduce_scatter", False):
        raise UserError(f"{source}: zero_optimization.reduce_scatter = true: Muon at stage 3 needs false")


def _eight_bits(source: str) -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"{source}: optimizer.type = {_EIGHT_BITS!r} needs bitsandbytes: pip install 'opd-ds[adamw8bit]'"
        ) from error
    return AdamW8bit


def client_optimizer(ds: dict[str, Any]) -> Callable[[Any], Any] | None:
    """What makes the optimizer of a complete ds_config from parameters, where DeepSpeed does not make it by name."""
    block = ds.get("optimizer", {})
    return partial(_eight_bits("ds_config"), **block["params"]) if block.get("type") == _EIGHT_BITS else None


def check_shapes(ds: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError where the optimizer of a complete ds_config cannot update trained weights of these shapes."""
    if ds["optimizer"]["type"] != "Muon" or zero_stage(ds) != 1:
        return
    for name, shape in shapes.items():
        if len(shape) > 2 and by_muon(name, shape):  # BF16_Optimizer (0.19.8) refuses it when all weights are loaded
            raise UserError(
                f"optimizer.type = 'Muon': {name!r} of shape {list(shape)} is no matrix, and DeepSpeed's Muon at ZeRO "
                "stage 1 takes nothing else; set the stage to 0 or 3"
            )


def check_device(ds: dict[str, Any], device: torch.device) -> None:
    """Raise UserError where DeepSpeed has no kernel of the optimizer for this device."""
    kind = ds["optimizer"]["type"]
    if device.type == "cpu" and kind in ("Lamb", "Lion") and not _offloads(ds):
        raise UserError(
            f"ds_config: optimizer.type = {kind!r}: DeepSpeed computes it on GPUs only; choose another"
            + (", or offload it to the CPU" if kind == "Lion" else "")
        )


def _offloads(ds: dict[str, Any]) -> bool:
    device: str = ds.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device != "none"


def _taken(kind: str, made: Any) -> set[str]:
    """Names of the parameters of an optimizer."""
    if kind == "Muon":
        return _MUON_TAKES | _ADAM_CHOICES | {"foreach"}
    takes = set(inspect.signature(made.__init__).parameters) - _NOT_PARAMS
    if kind == "Adafactor":
        takes -= {"eps"}  # two numbers, of which neither is Adam's
    if kind == _EIGHT_BITS:
        return takes - _FIXED_BITS
    if not made.__module__.startswith("torch"):
        takes -= {"amsgrad"}  # DeepSpeed's have it in their signatures only
    return takes | _ADAM_CHOICES if kind in _ADAMS else takes


def settle(found: Any, wanted: Any, given: bool, ds_key: str, run_key: str, source: str) -> Any:
    """What a ds_config and the run config say about one value.

    Raises:
        UserError: the run config gives it (`given`), and they differ.
    """
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted
    if found == AUTO:
        return wanted
    if given and found != wanted:
        raise UserError(
            f"{source}: {ds_key} = {found} and the run config's optimizer.{run_key} = {wanted} differ; "
            f'write "auto" in the one or remove the other'
        )
    return found


def _typed(params: dict[str, Any], source: str) -> dict[str, Any]:
    try:
        return _Params.model_validate(params).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0]
        message = "needs two numbers from 0 to below 1" if key == "betas" else problem["msg"]
        raise UserError(f"{source}: optimizer.params.{key} = {params[str(key)]!r}: {message}") from error


def fill_scheduler(ds: dict[str, Any], config: RunConfig, source: str) -> None:
    """Complete the scheduler of a ds_config, whose optimizer is complete, in place.

    Raises:
        UserError: an unknown type or parameter, a schedule in the run config as well, or one under which no step of
            the run would change a weight.
    """
    block, wanted, steps = ds["scheduler"], config.optimizer, config.steps_per_round
    kind = block["type"] = _named(block["type"], _PEAK_OF, f"{source}: scheduler.type")
    params = block["params"] = {name: value for name, value in block.get("params", {}).items() if value is not None}
    if wanted.schedule != "constant" or (wanted.warmup_rounds and params.get("warmup_num_steps") != AUTO):
        raise UserError(
            f"{source}: has a scheduler and the run config sets optimizer.warmup_rounds or schedule; keep one"
        )
    takes = set(inspect.signature(getattr(lr_schedules, kind).__init__).parameters)
    takes -= {"self", "optimizer", "last_batch_iteration"}
    for name in params.keys() - takes:
        remedy = nearest(name, takes) or " Remove it."
        raise UserError(f"{source}: scheduler.params.{name}: {kind} has no such parameter.{remedy}")
    peak, lr = _PEAK_OF[kind], ds["optimizer"]["params"]["lr"]
    if peak is not None:
        given = "lr" in wanted.model_fields_set
        params[peak] = settle(params.get(peak, AUTO), lr, given, f"scheduler.params.{peak}", "lr", source)
    if params.get("warmup_num_steps") == AUTO and wanted.warmup_rounds == 0:
        raise UserError(
            f'{source}: scheduler.params.warmup_num_steps = "auto" is optimizer.warmup_rounds, which is 0 here, and '
            "DeepSpeed knows no such warm-up; set it, or remove the scheduler for a constant learning rate"
        )
    if kind == "OneCycle" and "betas" in wanted.model_fields_set and params.get("cycle_momentum", True):
        raise UserError(
            f"{source}: scheduler OneCycle replaces optimizer.betas; remove them from the run config, or set "
            "scheduler.params.cycle_momentum to false"
        )
    from_run = {
        "warmup_num_steps": wanted.warmup_rounds * steps,
        "warmup_min_lr": 0.0,
        "warmup_min_ratio": 0.0,
        "total_num_steps": config.run.rounds * steps,
    }
    for name, value in params.items():
        if value == AUTO and name not in from_run:
            raise UserError(f'{source}: scheduler.params.{name} = "auto": the run config has no such value; give one')
        params[name] = from_run[name] if value == AUTO else value
    if not any(scheduled_rates(ds, config.run.rounds * steps, source)):
        raise UserError(
            f"{source}: under scheduler {kind} all {config.run.rounds} rounds have the learning rate 0 and train "
            "nothing; use optimizer.warmup_rounds and schedule of the run config instead"
        )


def scheduled_rates(ds: dict[str, Any], steps: int, source: str) -> list[float]:
    """The learning rate of every optimizer step under the completed scheduler of a ds_config.

    Raises:
        UserError: DeepSpeed does not take its parameters.
    """
    block = ds["scheduler"]
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=ds["optimizer"]["params"]["lr"])
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.ERROR)  # it warns about the rate before the first step, which it asks for itself
    try:
        with _explained(f"{source}: scheduler"):
            scheduler = getattr(lr_schedules, block["type"])(optimizer, **block["params"])
            rates = []
            for _ in range(steps):
                rates.append(float(optimizer.param_groups[0]["lr"]))
                scheduler.step()
    finally:
        deepspeed_logger.setLevel(level)
    return rates


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What libraries say of wrong parameters, as an error for the user."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{what}: {error}") from error


def _named(name: str, known: Iterable[str], key: str) -> str:
    """The name as it is spelled in `known`; DeepSpeed takes some names in any case."""
    names = {known_name.lower(): known_name for known_name in known}
    if name.lower() not in names:
        raise UserError(f"{key} = {name!r}: allowed are {', '.join(names.values())}.{nearest(name, names.values())}")
    return names[name.lower()]
