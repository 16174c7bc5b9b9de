"""A checkpoint in the form that diffusers loads, without an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.checkpoint.model_card import CARD, base_name, hub_id, loading_code, model_card, refuse_occupied
from opd_ds.checkpoint.store import read_state, refuse_damaged
from opd_ds.config.paths import resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ANCHOR
from opd_ds.engine import consolidated_weights
from opd_ds.errors import UserError, nearest
from opd_ds.evaluation.results import RESULTS_FILE, as_markdown, own_metrics, read_results
from opd_ds.models import ModelFamily, family_class, lora
from opd_ds.runs.monitor import SCORES_FILE, read_metrics
from opd_ds.runs.setup import EVALUATION_FOLDER
from opd_ds.training.networks import DTYPES, load_family
from opd_ds.utils.markdown import markdown_table

_NEVER_UPDATED = "the average was never updated, as student.ema.every is more than the optimizer steps"
FORMS = ("diffusers", "peft")


def checkpointed_student(family: ModelFamily, checkpoint: Path, *, averaged: bool = True) -> nn.Module:
    """The student's network as it is in a checkpoint, on the CPU, in the family's dtype.

    Args:
        averaged: with the averaged weights where an EMA was kept and updated, as a run's own export has them.

    Raises:
        UserError: not a checkpoint, or of another student.
    """
    state = read_state(checkpoint)
    averaged = averaged and has_average(state)
    network = family.load_transformer()
    if state["adapter"] is not None:
        lora.new_adapter(network, STUDENT_ADAPTER, LoraConfig(**state["adapter"]))
    weights = consolidated_weights(checkpoint, state["shapes"], averaged=averaged)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if len(family.networks) > 1:  # one of them may have been trained alone
        parts = {name.partition(".")[0] for name in state["shapes"]}
        trained = {name for name in trained if name.partition(".")[0] in parts}
    lacking = sorted(trained - weights.keys())
    unknown = network.load_state_dict(weights, strict=False).unexpected_keys
    if lacking or unknown:
        raise UserError(
            f"{checkpoint}: does not hold this student: {len(lacking)} trained weights are missing and {len(unknown)} "
            f"are unknown, the first: {(lacking + unknown)[0]!r}"
        )
    return network


def export_checkpoint(
    config: RunConfig,
    checkpoint: Path,
    folder: Path,
    *,
    averaged: bool,
    merge: bool = False,
    form: str = "diffusers",
    dtype: str | None = None,
) -> None:
    """Write `folder`, with a model card: a diffusers folder (full student, or a LoRA merged into its base), or a LoRA.

    Args:
        averaged: the averaged weights, not the last.
        merge: add a LoRA to its base.
        form: of a LoRA: `diffusers` (`pytorch_lora_weights.safetensors`) or `peft` (a PEFT folder).
        dtype: fp32, bf16 or fp16; default: the run's precision, fp32 for a LoRA by itself.

    Raises:
        UserError: the checkpoint is damaged or another run's or keeps no average, the folder is not empty, options
            that do not fit the student.
    """
    refuse_occupied(folder)
    state = read_state(checkpoint)
    if not set(config.resume_invariants) <= state["run"].keys():
        raise UserError(f"{checkpoint}: is of another kind of run than the config; give the one in its run's folder")
    kind = state["run"]["student"]["kind"]
    _refuse_options(checkpoint, kind, averaged and "ema" not in state["copies"], merge, form, dtype)
    refuse_damaged(checkpoint)
    if averaged and not has_average(state):
        logging.getLogger("opd_ds").warning("%s: %s; the last weights are exported", checkpoint, _NEVER_UPDATED)
        averaged = False
    if form == "peft" and len(family_class(config.model.family).networks) > 1:
        raise UserError("--format = 'peft': PEFT knows no LoRA of two networks; leave it out")
    base = resolve_path(config.model.path, "model.path")
    family = load_family(config, base, torch.device("cpu"), DTYPES[dtype] if dtype else None)
    network = checkpointed_student(family, checkpoint, averaged=averaged)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "lora" and not merge:
        trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        stored, lora_config = lora.to_store(trained, lora.adapter_config(network, STUDENT_ADAPTER))
        weights = {key: value.to(DTYPES[dtype or "fp32"]) for key, value in stored.items()}
        if form == "peft":
            lora.save_peft(weights, lora_config, folder, base=config.model.path)
        else:
            family.save_lora(weights, lora_config, folder)
    else:
        family.save_full(lora.merged_weights(network), folder)
    card = _card(config, state, checkpoint, folder, family, averaged=averaged, merge=merge, form=form)
    (folder / CARD).write_text(card, encoding="utf-8")


def _refuse_options(
    checkpoint: Path, kind: str, lacks_average: bool, merge: bool, form: str, dtype: str | None
) -> None:
    if lacks_average:
        raise UserError(
            f"{checkpoint}: keeps no averaged weights, as student.ema.decay was 0; give --raw for the last ones"
        )
    if merge and kind != "lora":
        raise UserError("--merge: the student has all its parameters trained, there is no LoRA to merge")
    if form not in FORMS:
        raise UserError(f"--format = {form!r}: unknown; allowed: {', '.join(FORMS)}.{nearest(form, FORMS)}")
    if form == "peft" and (kind != "lora" or merge):
        raise UserError("--format = 'peft': is for a LoRA by itself; a whole model is written as a diffusers folder")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype = {dtype!r}: unknown; allowed: {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")


def _card(
    config: RunConfig,
    state: dict[str, Any],
    checkpoint: Path,
    folder: Path,
    family: ModelFamily,
    *,
    averaged: bool,
    merge: bool,
    form: str,
) -> str:
    """What the weights are and where they come from, for whoever finds the folder."""
    run = state["run"]
    kind = run["student"]["kind"]
    anchor = [run["anchor"]] if "anchor" in run else []
    taught = f"taught {', '.join(run['tasks'])}"
    how = f"distilled from {len(run['tasks'])} teachers" if config.teachers else taught
    how += " and rewards" if config.teachers and config.learns_from_rewards else ""
    alone = kind == "lora" and not merge
    hub = hub_id(config.model.path, None)
    stored: Literal["full", "lora", "peft"] = "full" if not alone else "peft" if form == "peft" else "lora"
    return model_card(
        f"{base_name(config.model.path)}, {how}",
        f"{config.algorithm.title} by opd_ds: {'merged' if merge else kind} weights after {state['round']} rounds"
        + (", averaged (EMA)." if averaged else f", not averaged{_why_not(state)}.")
        + f" Trained on {config.rollout.steps} steps of its own sampling, guidance {config.rollout.guidance:g}.",
        base=config.model.path,
        base_folder=family.path,
        relation="adapter" if alone else "finetune",
        tags=[*(["lora"] if alone else []), *(["peft"] if stored == "peft" else []), _pipeline_tag(family)],
        sources=[
            ("base", config.model.path, run["base"]["sha256"]),
            *([("start", str(config.student.start), run["student"]["start"])] if run["student"]["start"] else []),
            *(
                (f"teacher of {name}", teacher.path, run["tasks"][name]["teacher_sha256"])
                for name, teacher in config.teachers.items()
            ),
            *(("anchor", config.all_teachers[ANCHOR].path, found["teacher_sha256"]) for found in anchor),
        ],
        settings={key: run[key] for key in ("seed", *config.resume_invariants)},
        code=loading_code(
            family.pipeline_class, hub or str(family.path), folder, stored, str(family.dtype).removeprefix("torch.")
        ),
        results=_results(config, state, checkpoint.parent.parent, averaged=averaged),
    )


def has_average(state: dict[str, Any]) -> bool:
    """Whether a checkpoint with this `state.json` holds an average of trained weights: one that was never updated is
    what the student started from.
    """
    kept = state["copies"].get("ema")
    return kept is not None and kept["steps"] >= state["run"]["student"]["ema"]["every"]


def _why_not(state: dict[str, Any]) -> str:
    return f": {_NEVER_UPDATED}" if "ema" in state["copies"] and not has_average(state) else ""


def _pipeline_tag(family: ModelFamily) -> str:
    return "text-to-video" if len(family.latent_shape) == 4 else "text-to-image"


def _results(config: RunConfig, state: dict[str, Any], run: Path, *, averaged: bool) -> str:
    """What these weights scored in the run: with intervals in its final evaluation, else means at this round.

    Runs score the averaged student where an average is kept, so other weights have no results.
    """
    if averaged != has_average(state):
        return ""
    final = run / EVALUATION_FOLDER / RESULTS_FILE
    if state["round"] == config.run.rounds and final.is_file():
        results = read_results(final)
        if "student" in results["scores"] and own_metrics(results):
            return "Mean reward on held-out prompts, ± half the 95 % bootstrap interval.\n\n" + as_markdown(results)
    rows = [row for row in read_metrics(run / SCORES_FILE) if row["round"] == state["round"]]
    means = {key: value for key, value in rows[-1].items() if key != "round"} if rows else {}
    table = [(key, "-" if value is None else f"{value:.3f}") for key, value in means.items()]
    return "Mean reward on held-out prompts.\n\n" + markdown_table(["", "student"], table) if table else ""
