"""The plan of a run on given devices, and the fastest setting that fits on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import GIB, Devices
from opd_ds.plan.memory import Memory, allowance, layout, rows_per_rank, run_memory
from opd_ds.plan.timing import Seconds, round_seconds

AS_FAST = 1.03  # the estimate is no finer than that
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Shipped ds_configs, from the least sharded on.
_STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu")
# What needs no travel first: `auto` is shared where that is possible, else resident.
_PLACEMENTS = ("auto", "offload", "stream", "zero_inference")


@dataclass(frozen=True)
class Plan:
    """What a run needs on `devices`."""

    config: RunConfig
    devices: Devices
    memory: Memory
    seconds: Seconds

    @property
    def needed(self) -> float:
        """Bytes on a device with the allowance."""
        return self.memory.peak + allowance(self.memory, self.devices)

    @property
    def fits(self) -> bool:
        return self.needed <= self.devices.kind.memory


@dataclass(frozen=True)
class Setting:
    """What a search may change: place and speed, no result.

    Attributes:
        placement: of all teachers; None where there is none.
    """

    deepspeed: str
    checkpointing: bool
    placement: str | None
    rollout: int
    train: int

    def of(self, config: RunConfig) -> RunConfig:
        """`config` with this setting."""
        changes: dict[str, Any] = {
            "deepspeed": self.deepspeed,
            "student": config.student.model_copy(update={"gradient_checkpointing": self.checkpointing}),
            "rollout": config.rollout.model_copy(update={"micro_batch": self.rollout}),
            "train": config.train.model_copy(update={"micro_batch": self.train}),
        }
        if self.placement is not None:
            place = {"placement": self.placement, "deepspeed": None}
            changes["tasks"] = {
                name: task.model_copy(update={"teacher": config.teachers[name].model_copy(update=place)})
                for name, task in config.tasks.items()
            }
        return config.model_copy(update=changes)

    def overrides(self, config: RunConfig) -> list[str]:
        """As `--set` takes them."""
        lines = [
            f"deepspeed={self.deepspeed}",
            f"student.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"rollout.micro_batch={self.rollout}",
            f"train.micro_batch={self.train}",
        ]
        if self.placement is not None:
            # Forwards that may be collective: as many on every rank.
            shared = self.placement == "auto" and self.deepspeed.startswith("zero3") and config.rollout.gather != "once"
            if (self.placement == "zero_inference" or shared) and config.scoring.micro_batch == "auto":
                lines.append("scoring.micro_batch=null")
            for name, teacher in config.teachers.items():
                lines.append(f"tasks.{name}.teacher.placement={self.placement}")
                if teacher.deepspeed is not None:
                    lines.append(f"tasks.{name}.teacher.deepspeed=null")
        return lines


def make_plan(config: RunConfig, costs: Costs, devices: Devices) -> Plan:
    """The run as it is configured."""
    placed = layout(config, costs, devices)
    memory, seconds = run_memory(config, costs, devices, placed), round_seconds(config, costs, devices, placed)
    return Plan(config, devices, memory, seconds)


def settings(config: RunConfig, devices: Devices) -> Iterator[Setting]:
    """The search space. Stage 0 is left out in half precision: there gradients of many micro-batches would add up in
    it.
    """
    rows = rows_per_rank(config, devices)
    fused = config.rollout.mode == "fused"
    rollouts = _up_to(rows * config.tasks_per_round)
    trains = (config.train.micro_batch,) if fused else _up_to(rows * config.trained_steps)
    placements: tuple[str | None, ...] = (_PLACEMENTS[:1] if fused else _PLACEMENTS) if config.teachers else (None,)
    for deepspeed in _STAGES[0 if config.precision == "fp32" else 1 :]:
        for checkpointing in (False, True):
            for placement in placements:
                for rollout in rollouts:
                    for train in trains:
                        yield Setting(deepspeed, checkpointing, placement, rollout, train)


def _up_to(most: int) -> tuple[int, ...]:
    return tuple(size for size in _SIZES if size < most) + ((most,) if most <= _SIZES[-1] else ())


def fit(config: RunConfig, costs: Costs, devices: Devices) -> tuple[Setting, Plan]:
    """The fastest setting that fits; of those that are as fast within 3 %, the first of `settings`: the plainest.

    Raises:
        UserError: none fits, naming the largest part of the one that needs least.
    """
    fitting: list[tuple[Setting, Plan]] = []
    smallest: Plan | None = None
    for setting in settings(config, devices):
        plan = make_plan(setting.of(config), costs, devices)
        if smallest is None or plan.needed < smallest.needed:
            smallest = plan
        if plan.fits:
            fitting.append((setting, plan))
    if fitting:
        fastest = min(plan.seconds.total for _, plan in fitting)
        return next((setting, plan) for setting, plan in fitting if plan.seconds.total <= fastest * AS_FAST)
    assert smallest is not None
    phase = smallest.memory.worst
    largest = max((part for part in smallest.memory.device if part.alive(phase)), key=lambda part: part.nbytes)
    raise UserError(
        f"{devices}: nothing fits; the setting that needs least takes {smallest.needed / GIB:.1f} GiB of "
        f"{devices.kind.memory / GIB:.1f} GiB a device in phase {phase.value}, most of it {largest.name} "
        f"({largest.nbytes / GIB:.1f} GiB); take more or larger devices, a LoRA student, or a smaller image"
    )
