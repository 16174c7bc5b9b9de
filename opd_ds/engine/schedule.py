"""The learning rate as a function of the optimizer step alone: nothing to save, and a resume repeats it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from opd_ds.config.schema import RunConfig
from opd_ds.engine.ds_components import scheduled_rates
from opd_ds.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The factor on the optimizer's learning rate at every optimizer step of a run.

    DeepSpeed's own schedules (0.19.8) have the rate 0 at the first step, warm up for 2 steps at least, and end a cosine
    at a ratio, one step early.

    Attributes:
        steps: optimizer steps of the whole run.
        warmup: steps of the linear warm-up, the last of which has the full rate.
        floor: the factor that a cosine ends with.
    """

    shape: Literal["constant", "cosine"]
    steps: int
    warmup: int = 0
    floor: float = 0.0

    @staticmethod
    def of(config: RunConfig, ds_config: dict[str, Any]) -> Schedule | None:
        """The run's, or None where its completed ds_config has a scheduler.

        Raises:
            UserError: `optimizer.min_lr` is above the learning rate.
        """
        if "scheduler" in ds_config:
            return None
        wanted, lr, steps = config.optimizer, ds_config["optimizer"]["params"]["lr"], config.steps_per_round
        if wanted.min_lr > lr:
            raise UserError(f"optimizer.min_lr = {wanted.min_lr:g} is above the learning rate, {lr:g}; lower it")
        return Schedule(wanted.schedule, config.run.rounds * steps, wanted.warmup_rounds * steps, wanted.min_lr / lr)

    def __call__(self, step: int) -> float:
        """The factor at step `step`, counted from 0; steps that fp16 skips count, so that the schedule ends with the
        run.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        first, last = max(self.warmup - 1, 0), self.steps - 1
        progress = min((step - first) / max(last - first, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


def learning_rates(schedule: Schedule | None, ds_config: dict[str, Any], steps: int) -> list[float]:
    """The learning rate of every optimizer step of a run, by its schedule or by the ds_config's scheduler."""
    if schedule is None:
        return scheduled_rates(ds_config, steps, "ds_config")
    lr = ds_config["optimizer"]["params"]["lr"]
    return [lr * schedule(step) for step in range(steps)]
