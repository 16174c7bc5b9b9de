"""The networks of a run: its model family, and the student's network as it is before the first round."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.config.paths import resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import StudentSection
from opd_ds.data.text_cache import TextCache
from opd_ds.errors import UserError, about
from opd_ds.models import ModelFamily, ParameterBuilder, build_family, family_class, lora
from opd_ds.models.inspection import check_base

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_base(config: RunConfig) -> Path:
    """The folder of the run's base, with all parts that the family loads.

    Raises:
        UserError: nothing is there, or a part is missing, damaged or in another form.
    """
    folder = resolve_path(config.model.path, "model.path")
    with about(f"model.path = {config.model.path!r}"):
        check_base(folder, family_class(config.model.family))
    return folder


def load_family(config: RunConfig, path: Path, device: torch.device, dtype: torch.dtype | None = None) -> ModelFamily:
    """The run's model family around the folder at `path`, in `dtype` or the run's precision; of several image sizes it
    has the first.

    Raises:
        UserError: a folder of another family.
    """
    settings = config.model
    height, width = settings.sizes[0] if settings.sizes else (settings.height, settings.width)
    family = build_family(
        settings.family,
        path,
        dtype=dtype or DTYPES[config.precision],
        device=device,
        height=height,
        width=width,
        frames=settings.frames,
        max_text_length=settings.max_text_length,
        negative_prompt=settings.negative_prompt,
        text_encoders="resident" if settings.text_encoders == "resident" else "offload",
        decode_micro_batch=settings.decode_micro_batch,
        reference_side=settings.reference_side,
        attention=settings.attention,
        vae_tiling=settings.vae_tiling,
    )
    if settings.low_noise_guidance is not None and family.boundary is None:
        raise UserError(
            f"model.low_noise_guidance = {settings.low_noise_guidance:g}: {settings.path} has one network; remove it"
        )
    family.low_noise_guidance = settings.low_noise_guidance
    if settings.text_encoders == "cached":
        family.encoded = TextCache(config.text_cache).read
    return family


def check_guidances(config: RunConfig, family: ModelFamily) -> None:
    """Raise UserError for a guidance of student or teachers that the model does not know."""
    family.check_guidance("rollout.guidance", config.rollout.guidance)
    for name, section in config.evaluated.items():
        if section.guidance is not None:
            family.check_guidance(f"{config.place(name)}.guidance", section.guidance)
    for name, teacher in config.all_teachers.items():
        family.check_guidance(f"{config.teacher_key(name)}.guidance", teacher.guidance)


def trained_networks(settings: StudentSection, family: ModelFamily) -> tuple[str, ...]:
    """Of `family.networks` those that are trained.

    Raises:
        UserError: one of two is asked for, where the model has one.
    """
    if settings.networks == "both":
        return family.networks
    if len(family.networks) == 1:
        raise UserError(f"student.networks = {settings.networks!r}: the model has one network; remove it")
    return family.networks[:1] if settings.networks == "high_noise" else family.networks[1:]


def freeze_untrained(module: nn.Module, settings: StudentSection, family: ModelFamily) -> None:
    """Of two networks the one that is not trained."""
    for part in {*family.networks} - {*trained_networks(settings, family)}:
        module.get_submodule(part).requires_grad_(False)


def lora_targets(settings: StudentSection, family: ModelFamily) -> list[str] | str:
    """Where a LoRA student adapts, as PEFT takes it: endings of names, or a pattern of whole names in one of two
    networks.
    """
    targets, trained = list(settings.lora.targets or family.lora_targets), trained_networks(settings, family)
    if trained == family.networks:
        return targets
    return rf"{trained[0]}\.(.*\.)?({'|'.join(map(re.escape, targets))})"


def student_module(
    settings: StudentSection,
    seed: int,
    family: ModelFamily,
    start: Path | None,
    build: ParameterBuilder | None = None,
) -> nn.Module:
    """The student's network as it is before the first round.

    Args:
        start: `settings.start`, found.
        build: as for `ModelFamily.load_transformer`. An adapter's parameters are whole, beside the base's.
    """
    adapter = start if start is not None and lora.is_adapter(start) else None
    merged = adapter if settings.kind == "full" else None
    module = family.load_transformer(start if adapter is None else None, build, merged, settings.quantize)
    if settings.kind == "full":
        freeze_untrained(module, settings, family)
    if settings.gradient_checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    if adapter is not None and settings.kind == "lora":
        module.requires_grad_(False)
        # The start may record its strength as another alpha; the function is the same, and alpha the student's own.
        read = lora.read_adapter(adapter, family.pipeline_class)
        lora.add_adapter(module, STUDENT_ADAPTER, *lora.rescaled(*read, settings.lora.alpha / settings.lora.rank))
        lora.activate(module, STUDENT_ADAPTER, trainable=True)
    elif settings.kind == "lora":
        torch.manual_seed(seed)  # the same start on every rank
        lora_config = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,
            target_modules=lora_targets(settings, family),
            init_lora_weights="gaussian",
        )
        lora.new_adapter(module, STUDENT_ADAPTER, lora_config)
    return module.train()
