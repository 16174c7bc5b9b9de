"""Writing the student in the form that diffusers loads."""

from __future__ import annotations

import logging
from pathlib import Path

from opd_ds.engine import Group, StudentEngine
from opd_ds.models import ModelFamily, lora

STUDENT_ADAPTER = "student"
EXPORT_FOLDER = "export"


def export_student(student: StudentEngine, family: ModelFamily, kind: str, folder: Path, group: Group) -> None:
    """A complete diffusers folder (full) or `pytorch_lora_weights.safetensors` (LoRA). Collective."""
    logging.getLogger("opd_ds").info("exporting the student to %s", folder)
    weights = student.gather_weights(trainable_only=kind == "lora")
    if group.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "lora":
            config = lora.adapter_config(student.module, STUDENT_ADAPTER)
            family.save_lora(*lora.to_store(weights, config), folder)
        else:
            family.save_full(weights, folder)
    group.barrier()
