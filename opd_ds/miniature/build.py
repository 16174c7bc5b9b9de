"""Building the whole miniature from scratch, stage by stage; a stage that is there already is not made again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.config.loading import load_config
from opd_ds.engine import Group
from opd_ds.miniature import reader, verify, world, write_hashes
from opd_ds.miniature.build_base import BaseSettings, round_to_half, train_base, train_vae
from opd_ds.miniature.networks import Sizes, make_pipeline
from opd_ds.runs.train import train

BASE = "miniature_base"
SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class BuildSettings:
    """The shipped world's settings; tests build a smaller one."""

    reader_steps: int = 2500
    vae_pictures: int = 6000
    sizes: Sizes = field(default_factory=Sizes)
    base: BaseSettings = field(default_factory=BaseSettings)
    teach: tuple[str, ...] = ()  # overrides of the teachers' recipes, as `--set` takes them
    log: Callable[[str], None] = field(default=print)


def build(output_dir: Path, group: Group, seed: int = 0, settings: BuildSettings | None = None) -> dict[str, Any]:
    """Make reader, base, teachers, prompts and report under `output_dir`; returns the report.

    Teachers are made by the recipes `miniature_nft_<task>`. The report holds every model's mean reward on each task's
    held-out prompts.

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
    for task in world.TASKS:
        if not (output_dir / "teachers" / task).is_dir():
            log(f"teacher {task}")
            _teach(output_dir.resolve(), task, seed, settings, group)
    log("report")
    scores = _report(output_dir)
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
    file = output_dir / "prompts" / world.ALL_TASKS / "test.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(scene.prompt(world.ALL_TASKS) + "\n" for scene in world.probe_scenes()))


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
        round_to_half(draft / part / "diffusion_pytorch_model.safetensors")
    draft.rename(folder)


def _teach(output_dir: Path, task: str, seed: int, settings: BuildSettings, group: Group) -> None:
    """The task's recipe, on base and reader as they were built; a diffusers transformer beside its scheduler."""
    work = output_dir / f".{task}"
    values: dict[str, Any] = {
        "run.output_dir": str(work),
        "run.seed": seed,
        "model.path": str(output_dir / BASE),
        "model.max_text_length": settings.sizes.text_length,
        f"tasks.{task}.prompts": str(output_dir / "prompts" / task / "train.txt"),
    }
    # The first is the headline; the text reward asks the reader that was built.
    rewards = {name: [f"miniature_{name}"] for name in world.TASKS}
    rewards[world.ALL_TASKS] = ["miniature_all", *(f"miniature_{name}" for name in world.TASKS)]
    options = {name: {"folder": str(output_dir)} for name in ("miniature_text", "miniature_all")}
    for name, labels in rewards.items():
        section = "tasks" if name == task else "probes"
        values[f"{section}.{name}.eval_prompts"] = str(output_dir / "prompts" / name / "test.txt")
        values[f"{section}.{name}.rewards"] = [{"name": label, "options": options.get(label, {})} for label in labels]
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    train(load_config(f"miniature_nft_{task}", None, [*overrides, *settings.teach]), group, resume="auto")
    export, draft = work / EXPORT_FOLDER, output_dir / "teachers" / f".{task}"
    for part in ("transformer", "scheduler"):
        shutil.copytree(export / part, draft / part)
    round_to_half(draft / "transformer" / "diffusion_pytorch_model.safetensors")
    models = json.loads((work / "summary.json").read_text())["models"]
    (draft / SCORES_FILE).write_text(json.dumps(models, indent=1) + "\n")
    draft.rename(output_dir / "teachers" / task)
    shutil.rmtree(work)


def _report(output_dir: Path) -> dict[str, dict[str, float]]:
    """Mean rewards on the held-out prompts, by model and task, as the runs that made the teachers found them."""
    scores: dict[str, dict[str, float]] = {}
    for task in world.TASKS:
        models = json.loads((output_dir / "teachers" / task / SCORES_FILE).read_text())
        scores |= {"base": models["base"], f"teacher:{task}": models["student"]}
    return scores


def _reader_accuracy(folder: Path, strokes: tuple[Tensor, Tensor]) -> float:
    """On clean images of digits that the reader has never seen."""
    batch = world.random_pictures(*strokes, 2000, torch.Generator().manual_seed(5), soiled=0.0)
    with torch.no_grad():
        return float((reader.load_reader(folder)(batch.pictures).argmax(1) == batch.digit).float().mean())
