"""`rollout.mode: auto`: whether rollouts train as they go."""

from __future__ import annotations

from typing import Literal

import torch

from opd_ds.config.schema import RunConfig
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import GIB, Devices
from opd_ds.plan.memory import allowance, layout, run_memory
from opd_ds.plan.passes import Passes, round_passes
from opd_ds.plan.timing import round_seconds

Mode = Literal["buffered", "fused"]


def mode_without_plan(config: RunConfig, *, on_cpu: bool) -> tuple[Mode, str] | None:
    """The mode of a run and why, where settings alone say it; None: ask `choose_mode`."""
    if config.rollout.mode != "auto":
        return config.rollout.mode, "as rollout.mode says"
    if on_cpu:
        return "buffered", "on CPUs, where large batches count for more than the pass that fused saves"
    if against := config.against_fused:
        return "buffered", f"fused is not possible: {against[0]}"
    fused, buffered = (_units(config.with_mode(mode)) for mode in ("fused", "buffered"))
    if fused >= buffered:
        return "buffered", f"{buffered:,} pass units a round, fused takes {fused:,}: with random steps it trains all"
    return None


def choose_mode(config: RunConfig, costs: Costs, devices: Devices) -> tuple[Mode, str]:
    """The mode of a run on `devices`, and why. Fused where that is possible, takes fewer passes, fits beside the rest
    of a round, and is planned to be faster: under ZeRO-3 it gathers weights at every step.
    """
    known = mode_without_plan(config, on_cpu=devices.kind.is_cpu)
    if known is not None:
        return known
    fused, buffered = config.with_mode("fused"), config.with_mode("buffered")
    placed = layout(fused, costs, devices)
    memory = run_memory(fused, costs, devices, placed, rounds_only=True)
    needed, there = memory.peak + allowance(memory, devices), devices.kind.memory
    if needed > there:
        return "buffered", f"fused needs {needed / GIB:.1f} GiB a device by the plan, {there / GIB:.1f} are there"
    seconds = {mode: round_seconds(one, costs, devices).total for mode, one in (("fused", fused), ("", buffered))}
    if seconds["fused"] >= seconds[""]:
        return "buffered", f"planned to take {seconds['']:.2f} s a round, fused {seconds['fused']:.2f}"
    return "fused", (
        f"{_units(fused):,} pass units a round instead of {_units(buffered):,}; {needed / GIB:.1f} GiB a device by the "
        f"plan, {there / GIB:.1f} are there"
    )


def _units(config: RunConfig) -> int:
    """Of a round of every task."""
    return sum((one for task in config.tasks for one in round_passes(config, task).values()), Passes()).units


def devices_here(world_size: int, free: float) -> Devices:
    """The GPUs that a run has.

    Args:
        free: bytes that are free on each.
    """
    return Devices.like(torch.cuda.get_device_name(), world_size, free)
