"""`rollout.mode: auto` of a run that starts, decided once for all ranks."""

from __future__ import annotations

import logging

import torch

from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.plan.costs import Costs
from opd_ds.plan.network import find_model
from opd_ds.plan.rollout_mode import Mode, choose_mode, devices_here, mode_without_plan
from opd_ds.runs.files import RunFiles
from opd_ds.runs.resume import ResumePoint

ENTRY = "rollout_mode"  # of a checkpoint's state


def with_decided_mode(config: RunConfig, files: RunFiles, group: Group, resumed: ResumePoint | None) -> RunConfig:
    """`config` with its rollout mode; a run that goes on keeps its own. What was chosen is in the log. Collective."""
    if config.rollout.mode != "auto":
        return config
    kept = resumed.state.get(ENTRY) if resumed is not None else None
    if kept == "buffered" or (kept == "fused" and not config.against_fused):
        mode, reason = kept, "as before the checkpoint"
    else:
        known = mode_without_plan(config, on_cpu=group.device.type == "cpu")
        mode, reason = known or _planned(config, files, group)
    if group.world.is_main:
        logging.getLogger("opd_ds").info("rollout.mode = auto: %s (%s)", mode, reason)
    return config.with_mode(mode)


def _planned(config: RunConfig, files: RunFiles, group: Group) -> tuple[Mode, str]:
    """By the plan of the run on the GPUs that it has, of which the one with the least free memory counts."""
    free = min(group.gather(torch.cuda.mem_get_info(group.device)[0]))
    chosen: tuple[Mode, str] | None = None
    if group.world.is_main:
        here = config.with_teachers(
            {name: spec.settings.model_copy(update={"path": str(spec.path)}) for name, spec in files.teachers.items()}
        )
        here = here.model_copy(update={"model": config.model.model_copy(update={"path": str(files.model)})})
        try:
            chosen = choose_mode(here, Costs(find_model(here), here), devices_here(group.world.size, free))
        except UserError as error:
            chosen = "buffered", f"there is no plan: {error}"
    found: tuple[Mode, str] = group.broadcast(chosen)
    return found
