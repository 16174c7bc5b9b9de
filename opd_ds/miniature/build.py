"""Building the whole miniature from scratch, stage by stage; a stage that is there already is not made again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd_ds.miniature import reader, verify, world, write_hashes
from opd_ds.miniature.build_base import BaseSettings, encode_pictures, train_base, train_vae
from opd_ds.miniature.build_teachers import PromptTable, TeacherSettings, held_out_score, train_teacher
from opd_ds.miniature.networks import Sizes, make_pipeline
from opd_ds.miniature.rewards import CompositionReward, LookReward, TextReward
from opd_ds.models import lora
from opd_ds.models.sd3 import SD3
from opd_ds.rewards import Reward

BASE = "miniature_base"
STUDENT_GUIDANCE = 2.0
LORA_TARGETS = [f"attn.{name}" for name in (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)] + ["ff.net.0.proj", "ff.net.2", "norm1.linear"]  # fmt: skip

TEACHERS = (
    TeacherSettings("text", lora_rank=16, guidance=2.0, lr=1.5e-3),
    TeacherSettings("composition", lora_rank=None, guidance=1.0, lr=3e-4),
    TeacherSettings("look", lora_rank=16, guidance=2.0, lr=1.5e-3),
)


@dataclass(frozen=True)
class BuildSettings:
    """The shipped world's settings; tests build a smaller one."""

    reader_steps: int = 2500
    vae_pictures: int = 6000
    sizes: Sizes = field(default_factory=Sizes)
    base: BaseSettings = field(default_factory=BaseSettings)
    teachers: tuple[TeacherSettings, ...] = TEACHERS
    noises: int = 8  # per held-out prompt, in the report
    log: Callable[[str], None] = field(default=print)


def build(output_dir: Path, seed: int = 0, settings: BuildSettings | None = None) -> dict[str, Any]:
    """Make reader, base, teachers, prompts and report under `output_dir`; returns the report.

    The report holds every model's mean reward on each task's held-out prompts, and the seconds of each stage.

    Raises:
        UserError: scikit-learn is not installed.
    """
    settings = settings or BuildSettings()
    strokes = world.load_strokes()
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def log(text: str) -> None:
        settings.log(f"{time.perf_counter() - started:6.0f} s  {text}")

    _write_prompts(output_dir)
    if not (output_dir / reader.FILE).is_file():
        log("reader")
        reader.save_reader(reader.train_reader(*strokes["reader"], settings.reader_steps, seed), output_dir)
    if not (output_dir / BASE).is_dir():
        log("base")
        _build_base(output_dir / BASE, strokes["world"], settings, seed, log)
    family = _family(output_dir / BASE, settings)
    table = PromptTable(family)
    rewards: dict[str, Reward] = {
        "text": TextReward(output_dir),
        "composition": CompositionReward(),
        "look": LookReward(),
    }
    vae = StableDiffusion3Pipeline.from_pretrained(output_dir / BASE, transformer=None, dtype=torch.float32).vae
    for teacher in settings.teachers:
        folder = output_dir / "teachers" / teacher.task
        if not folder.is_dir():
            log(f"teacher {teacher.task}")
            network = family.load_transformer()
            _prepare_teacher(network, teacher, seed)
            train_teacher(
                family, network, table, rewards[teacher.task], teacher, settings.base, strokes["world"],
                lambda pictures: encode_pictures(vae, pictures), seed, log,
            )  # fmt: skip
            _save_teacher(network, teacher, folder, output_dir / BASE)
    log("report")
    scores = _report(family, table, rewards, settings, output_dir)
    report = {"scores": scores, "reader_accuracy": _reader_accuracy(output_dir, strokes["reader_test"]), "seed": seed}
    (output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_hashes(output_dir)
    verify(output_dir)
    for model, row in scores.items():
        log(f"{model:22} " + "  ".join(f"{task} {value:.3f}" for task, value in row.items()))
    return report


def _write_prompts(output_dir: Path) -> None:
    for task in world.TASKS:
        folder = output_dir / "prompts" / task
        folder.mkdir(parents=True, exist_ok=True)
        for name, scenes in zip(("train", "test"), world.split_scenes(task), strict=True):
            (folder / f"{name}.txt").write_text("".join(scene.prompt(task) + "\n" for scene in scenes))


def _family(folder: Path, settings: BuildSettings) -> SD3:
    cpu = torch.device("cpu")
    return SD3(folder, dtype=torch.float32, device=cpu, max_text_length=settings.sizes.text_length)


def _build_base(
    folder: Path, strokes: tuple[Tensor, Tensor], settings: BuildSettings, seed: int, log: Callable[[str], None]
) -> None:
    prompts = [scene.prompt(task) for task in world.TASKS for scene in world.scenes()]
    pipeline = make_pipeline(prompts, settings.sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    pictures = world.random_pictures(*strokes, settings.vae_pictures, generator, soiled=0.5).pictures
    train_vae(pipeline.vae, pictures, settings.base.vae_steps, seed, log)
    train_base(pipeline, strokes, settings.base, seed, log)
    draft = folder.with_name(f".{folder.name}")
    pipeline.save_pretrained(draft)
    # Half the size; diffusers loads them as float32. The text encoders stay, transformers would load them as float16.
    for part in ("transformer", "vae"):
        _round_to_half(draft / part / "diffusion_pytorch_model.safetensors")
    draft.rename(folder)


def _round_to_half(file: Path) -> None:
    save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})


def _prepare_teacher(network: nn.Module, settings: TeacherSettings, seed: int) -> None:
    if settings.lora_rank is None:
        network.requires_grad_(True)
        return
    torch.manual_seed(seed)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=LORA_TARGETS)
    lora.new_adapter(network, settings.task, config)


def _save_teacher(network: nn.Module, settings: TeacherSettings, folder: Path, base: Path) -> None:
    """A LoRA as PEFT saves it; a full checkpoint as a diffusers transformer beside its scheduler."""
    draft = folder.with_name(f".{folder.name}")
    draft.mkdir(parents=True)
    if settings.lora_rank is None:
        assert isinstance(network, SD3Transformer2DModel)
        network.save_pretrained(draft / "transformer")
        _round_to_half(draft / "transformer" / "diffusion_pytorch_model.safetensors")
        (draft / "scheduler").mkdir()
        scheduler = "scheduler/scheduler_config.json"
        (draft / scheduler).write_bytes((base / scheduler).read_bytes())
    else:
        state = {
            f"base_model.model.{key}": value.detach().half()
            for key, value in lora.adapter_parameters(network, settings.task).items()
        }
        save_file(state, draft / lora.PEFT_WEIGHTS, {"format": "pt"})
        fields = {
            "peft_type": "LORA",
            "base_model_name_or_path": base.name,
            "r": settings.lora_rank,
            "lora_alpha": 2 * settings.lora_rank,
            "target_modules": LORA_TARGETS,
        }
        (draft / lora.PEFT_CONFIG).write_text(json.dumps(fields, indent=1) + "\n")
    draft.rename(folder)


def _report(
    family: SD3, table: PromptTable, rewards: dict[str, Reward], settings: BuildSettings, output_dir: Path
) -> dict[str, dict[str, float]]:
    """Scores of the base and of the teachers as they were saved."""
    models: dict[str, tuple[nn.Module, float]] = {"base": (family.load_transformer(), STUDENT_GUIDANCE)}
    for teacher in settings.teachers:
        folder = output_dir / "teachers" / teacher.task
        if teacher.lora_rank is None:
            network = family.load_transformer(folder)
        else:
            network = family.load_transformer()
            lora.load_adapter(network, teacher.task, folder)
        models[f"teacher:{teacher.task}"] = (network, teacher.guidance)
    return {
        name: {
            task: held_out_score(family, network, table, task, rewards[task], guidance, settings.noises)
            for task in world.TASKS
        }
        for name, (network, guidance) in models.items()
    }


def _reader_accuracy(folder: Path, strokes: tuple[Tensor, Tensor]) -> float:
    """On clean pictures of digits that the reader has never seen."""
    batch = world.random_pictures(*strokes, 2000, torch.Generator().manual_seed(5), soiled=0.0)
    with torch.no_grad():
        return float((reader.load_reader(folder)(batch.pictures).argmax(1) == batch.digit).float().mean())
