"""The recipes for LoRA teachers of one's own: refused until those are named, complete once they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from PIL import Image
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.errors import UserError
from opd_ds.models import FAMILIES, lora
from opd_ds.testing.family_checks import build, tiny_module

RECIPES = {
    "mopd_flux1": "flux",
    "mopd_flux1_kontext": "flux_kontext",
    "mopd_flux2_klein": "flux2",
    "mopd_qwen_image": "qwen_image",
    "mopd_z_image": "z_image",
    "mopd_wan21": "wan",
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
    built = build(family, base, width=32)
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
