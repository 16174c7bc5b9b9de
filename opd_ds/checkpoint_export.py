"""A checkpoint in the form that diffusers loads, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.checkpoint import read_state, refuse_damaged
from opd_ds.config import DistilConfig, RunConfig
from opd_ds.engine import consolidated_weights
from opd_ds.errors import UserError
from opd_ds.export import STUDENT_ADAPTER
from opd_ds.loading import resolve_path
from opd_ds.models import ModelFamily, lora
from opd_ds.preparation import load_family
from opd_ds.release import CARD, base_name, model_card, refuse_occupied
from opd_ds.teach.config import TeachConfig


def checkpointed_student(family: ModelFamily, checkpoint: Path, *, averaged: bool = True) -> nn.Module:
    """The student's network as it is in a checkpoint, on the CPU, in the family's dtype.

    Args:
        averaged: with the averaged weights where an EMA was kept, as a run's own export has them.

    Raises:
        UserError: not a checkpoint, or of another student.
    """
    state = read_state(checkpoint)
    network = family.load_transformer()
    if state["adapter"] is not None:
        lora.new_adapter(network, STUDENT_ADAPTER, LoraConfig(**state["adapter"]))
    weights = consolidated_weights(checkpoint, state["shapes"], averaged=averaged)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    lacking = sorted(trained - weights.keys())
    unknown = network.load_state_dict(weights, strict=False).unexpected_keys
    if lacking or unknown:
        raise UserError(
            f"{checkpoint}: does not hold this student: {len(lacking)} trained weights are missing and {len(unknown)} "
            f"are unknown, the first: {(lacking + unknown)[0]!r}"
        )
    return network


def export_checkpoint(config: RunConfig, checkpoint: Path, folder: Path, *, averaged: bool, merge: bool) -> None:
    """Write `folder`: a diffusers folder (full student, or a LoRA merged into its base), or
    `pytorch_lora_weights.safetensors`; with a model card.

    Raises:
        UserError: the checkpoint is damaged or another run's, the folder is not empty, nothing to merge.
    """
    refuse_occupied(folder)
    state = read_state(checkpoint)
    refuse_damaged(checkpoint)
    if not set(config.deciding) <= state["run"].keys():
        raise UserError(f"{checkpoint}: is of another kind of run than the config; give the one in its run's folder")
    kind = state["run"]["student"]["kind"]
    if merge and kind != "lora":
        raise UserError("--merge: the student has all its parameters trained, there is no LoRA to merge")
    base = resolve_path(config.model.path, "model.path")
    family = load_family(config, base, torch.device("cpu"))
    network = checkpointed_student(family, checkpoint, averaged=averaged)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "lora" and not merge:
        weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        family.save_lora(lora.strip_adapter_name(weights), lora.adapter_config(network, STUDENT_ADAPTER), folder)
    else:
        family.save_full(lora.merged_weights(network), folder)
    form = "merged" if merge else kind
    (folder / CARD).write_text(_card(config, state, checkpoint, form, averaged=averaged), encoding="utf-8")


def _card(config: RunConfig, state: dict[str, Any], checkpoint: Path, form: str, *, averaged: bool) -> str:
    """What the weights are and where they come from, for whoever finds the folder."""
    run = state["run"]
    results = checkpoint.parent.parent / "summary.json"
    if isinstance(config, TeachConfig):
        how, method = f"taught {', '.join(run['tasks'])}", f"Reinforcement learning ({config.teach.algorithm})"
    else:
        how = f"distilled from {len(run['tasks'])} teachers"
        method = "On-policy distillation (arXiv 2605.15055)"
    card = model_card(
        f"{base_name(config.model.path)}, {how}",
        f"{method} by opd_ds: {form} weights after {state['round']} rounds"
        + (", averaged (EMA)." if averaged and "ema" in state["copies"] else "."),
        base=config.model.path,
        sources=[
            ("base", config.model.path, run["base"]["sha256"]),
            *([("start", str(config.student.start), run["student"]["start"])] if run["student"]["start"] else []),
            *(
                (f"teacher of {name}", teacher.path, run["tasks"][name]["teacher_sha256"])
                for name, teacher in config.teachers.items()
            ),
            *([("anchor", _anchor(config), run["anchor"]["teacher_sha256"])] if "anchor" in run else []),
        ],
        settings={key: run[key] for key in ("seed", *config.deciding)},
    )
    if state["round"] == config.run.rounds and results.is_file():
        scores = json.loads(results.read_text(encoding="utf-8"))["tasks"]
        lines = [
            "",
            "## Mean reward on held-out prompts",
            "",
            "| task | base | teacher | student |",
            "|---|---|---|---|",
        ]
        for name, row in scores.items():
            cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("base", "teacher", "student")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        card += "\n".join(lines) + "\n"
    return card


def _anchor(config: RunConfig) -> str:
    return config.anchor.path if isinstance(config, DistilConfig) and config.anchor else ""
