"""The recipes for LoRA teachers of one's own: refused until those are named, complete once they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.errors import UserError
from opd_ds.models import FAMILIES, lora
from opd_ds.runs.files import find_files
from opd_ds.runs.without_effect import files_without_effect
from opd_ds.testing.family_checks import build, tiny_module
from opd_ds.training.networks import load_family
from tests.tiny import write_config

RECIPES = {
    "mopd_flux1": "flux",
    "mopd_flux1_kontext": "flux_kontext",
    "mopd_flux2_klein": "flux2",
    "mopd_flux2_dev": "flux2_dev",
    "mopd_qwen_image": "qwen_image",
    "mopd_qwen_image_edit": "qwen_image_edit",
    "mopd_qwen_image_edit_plus": "qwen_image_edit_plus",
    "absorb_qwen_image": "qwen_image",
    "mopd_z_image": "z_image",
    "mopd_wan21": "wan",
    "mopd_wan22_a14b": "wan_a14b",
    "mopd_ltx": "ltx",
}


def tasks_of(name: str) -> list[str]:
    return list(load_config(name, None, []).tasks)


def dry_run(name: str, folder: Path, model: Path, *settings: str) -> str:
    Image.new("RGB", (40, 24), "red").save(folder / "red.png")
    lines = [{"prompt": prompt, "image": "red.png"} for prompt in ("a sign that says 'open'", "a red house")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = [
        f"tasks.{task}.{key}.path={folder / 'prompts.jsonl'}"
        for task in tasks_of(name)
        for key in ("prompts", "eval_prompts")
    ]
    words = [word for setting in (f"model.path={model}", *keys, *settings) for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["train", "--recipe", name, "--dry-run", "--processes", "8", *words])
    if result.exception is not None:
        raise result.exception
    return result.output


def write_lora(family: str, base: Path, folder: Path) -> Path:
    """A LoRA of the family's own targets, as diffusers saves it."""
    built = build(family, base, height=32, width=32)
    network = built.load_transformer()
    lora.new_adapter(network, "student", LoraConfig(r=2, lora_alpha=4, target_modules=list(built.lora_targets)))
    state = lora.strip_adapter_name(lora.adapter_parameters(network, "student"))
    built.save_lora(state, lora.adapter_config(network, "student"), folder)
    return folder


def test_every_family_has_a_recipe() -> None:
    found = {load_config(name, None, []).model.family for name in recipe_names() if name.startswith("mopd_")}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_family_recipe_is_complete_but_for_teachers(name: str, tmp_path: Path) -> None:
    family = RECIPES[name]
    base = tiny_module(family).write(tmp_path / "base")
    with pytest.raises(UserError, match=r"^tasks\.(\w+)\.teacher\.path = '<LoRA for \1>' stands for something of your"):
        dry_run(name, tmp_path, base)
    teacher = write_lora(family, base, tmp_path / "my-lora")
    tasks = tasks_of(name)
    printed = dry_run(name, tmp_path, base, *(f"tasks.{task}.teacher={teacher}" for task in tasks))
    assert f"2: {', '.join(f'{task} (teacher my-lora)' for task in tasks)}" in printed
    assert "placement: shared" in printed


def test_a_model_absorbs_its_own_guidance_by_a_recipe(tiny_world: Path, tmp_path: Path) -> None:
    """The base as the one teacher: asked in the student's network, and without a hint that it teaches nothing."""
    data = {"model": {"path": str(tiny_world / "base"), "height": 16, "width": 16, "max_text_length": 10}}
    teacher = {"teacher": str(tiny_world / "base"), "prompts": str(tiny_world / "prompts.txt"), "eval_prompts": None}
    data |= {"tasks": {"aesthetic": teacher, "ocr": None, "geneval": None}}
    config = load_config("absorb_sd35m", write_config(tmp_path / "own.yaml", data), [f"run.output_dir={tmp_path}"])
    assert isinstance(config, DistilConfig)
    assert (config.student_guidance("aesthetic"), config.teachers["aesthetic"].guidance) == (1.0, 4.5)
    files = find_files(config, World())
    assert files.teachers["aesthetic"].settings.placement == "shared"
    family = load_family(config, files.model, torch.device("cpu"))
    assert not [line for line in files_without_effect(config, files, family) if "teacher" in line]
