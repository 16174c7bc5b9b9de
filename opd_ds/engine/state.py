"""What a resume needs, out of the engine and back into it, in terms that know neither ZeRO stage nor rank.

A tensor entry is keyed `kind/start/parameter`: the elements from `start` on of the flattened parameter, 1-D, fp32 (or
uint8: `moments` says which). `kind` is `master`, a moment of the optimizer (`exp_avg`, ...), the name of a further copy
of the weights, or `waiting`: what a round will train on (`opd_ds.training.late`), where columns take the place of
parameters and keep their own dtype.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from opd_ds.engine import privates
from opd_ds.engine.fragments import Fragment, in_memory, moments
from opd_ds.engine.moments import carried, restore
from opd_ds.engine.privates import inner_optimizer
from opd_ds.engine.shards import ShardReader

MASTER, EMA, OLD_POLICY, START, WAITING = "master", "ema", "old_policy", "start", "waiting"
_NO_MOMENTS = {MASTER, EMA, OLD_POLICY, START, WAITING}
_GROUP_FIELDS = ("lr", "betas", "momentum")  # what schedules move


def entry(kind: str, fragment: Fragment) -> str:
    """The key of one tensor entry."""
    return f"{kind}/{fragment.start}/{fragment.name}"


def state_dict(engine: DeepSpeedEngine, owned: list[Fragment]) -> dict[str, Tensor]:
    """Masters and moments of the fragments, as copies on the CPU."""
    entries: dict[str, Tensor] = {}
    for fragment in owned:
        with in_memory(engine.optimizer, fragment, write=False):
            entries[entry(MASTER, fragment)] = _copy(fragment.master)
            for kind, value in carried(moments(engine.optimizer, fragment.flat), fragment):
                entries[entry(kind, fragment)] = value if value.dtype == torch.uint8 else _copy(value)
    return entries


def load_state_dict(engine: DeepSpeedEngine, held: list[Fragment], shards: ShardReader, optimizer_step: int) -> None:
    """Fill masters and moments. The network's own weights are not touched: publish the masters afterwards.

    Raises:
        DamagedCheckpointError: a part of a parameter is in none of the files.
    """
    inner = inner_optimizer(engine.optimizer)
    by_flat: dict[int, list[Fragment]] = defaultdict(list)
    for fragment in held:
        by_flat[id(fragment.flat)].append(fragment)
    for parts in by_flat.values():
        with ExitStack() as stack:
            stack.enter_context(in_memory(engine.optimizer, parts[0], write=True))
            for part in parts:
                part.master.copy_(shards.read(MASTER, part.name, part.start, part.numel))
            kinds = {kind for part in parts for kind in shards.kinds_of(part.name)} - _NO_MOMENTS
            if not kinds:  # written before the first step (fp16 skips those that overflow): leave the optimizer alone
                continue
            _set_step(inner, restore(inner, parts, shards, kinds), optimizer_step)


def scalar_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Step counts, learning rates, schedule and loss scale; equal on all ranks, fit for JSON."""
    inner = inner_optimizer(engine.optimizer)
    return {
        "engine": privates.counters(engine),
        "optimizer_step": _step(inner),
        "groups": [{name: group[name] for name in _GROUP_FIELDS if name in group} for group in inner.param_groups],
        "scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "loss_scaler": privates.loss_scale(engine),
    }


def load_scalar_state(engine: DeepSpeedEngine, saved: dict[str, Any]) -> None:
    """Put back what `scalar_state` gave; the optimizer's step count is set with its moments.

    What no schedule moves is as the run is configured now: `--allow-change` may have changed it.
    """
    privates.set_counters(engine, saved["engine"])
    if engine.lr_scheduler is not None and saved["scheduler"] is not None:
        for group, fields in zip(inner_optimizer(engine.optimizer).param_groups, saved["groups"], strict=True):
            group |= {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        engine.lr_scheduler.load_state_dict(saved["scheduler"])
    privates.set_loss_scale(engine, saved["loss_scaler"])


def _copy(view: Tensor) -> Tensor:
    return view.to("cpu", torch.float32, copy=True)


def _step(inner: Any) -> int:
    """Updates done: torch keeps the count per tensor, DeepSpeed's CPU Adam too, its fused Adam per group."""
    counts = [state["step"] for state in inner.state.values() if "step" in state]
    counts += [group["step"] for group in inner.param_groups if "step" in group]
    return max((int(count) for count in counts), default=0)


def _set_step(inner: Any, state: dict[str, Any], step: int) -> None:
    owner = getattr(inner, "aux_optimizer", None) or inner  # Muon has an Adam for what is no matrix
    if type(owner).__module__.startswith("torch.optim"):
        state["step"] = torch.tensor(float(step))
    else:
        state["step"] = step
        for group in inner.param_groups:
            group["step"] = step
