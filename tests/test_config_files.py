"""How a config is put together: recipes, the user's own files on top of them, and the paths that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.config.paths import resolve_ds_config, resolve_path
from opd_ds.config.sections import PromptsSection
from opd_ds.data.readers import locate
from opd_ds.errors import UserError
from tests.tiny import run_settings, write_config


def distil(file: Path, *overrides: str, recipe: str | None = None) -> DistilConfig:
    config = load_config(recipe, file, list(overrides))
    assert isinstance(config, DistilConfig)
    return config


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# ---- recipes ----


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_is_the_same_config(tmp_path: Path, name: str) -> None:
    file = tmp_path / "new" / "mine.yaml"
    result = CliRunner().invoke(app, ["recipes", "copy", name, str(file)], catch_exceptions=False)
    assert f"opd-ds train --config {file} --dry-run" in result.output
    assert load_config(None, file, []) == load_config(name, None, [])
    assert CliRunner().invoke(app, ["recipes", "show", name]).output == file.read_text()


def test_a_copy_has_what_keys_mean_and_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    CliRunner().invoke(app, ["recipes", "copy", "mopd_sd35m", str(file)], catch_exceptions=False)
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# SD3.5-Medium, three LoRA teachers")
    assert lines[lines.index("  rounds: 500") - 1] == "  # optimizer rounds in all"
    assert lines.count("    prompts: data/ocr/train.txt") == 1
    file.write_text("mine")
    result = CliRunner().invoke(app, ["recipes", "copy", "mopd_sd35m", str(file)])
    assert (isinstance(result.exception, UserError), file.read_text()) == (True, "mine")


def test_recipes_names_the_nearest() -> None:
    result = CliRunner().invoke(app, ["recipes", "show", "mopd_sd35"])
    assert "Did you mean 'mopd_sd35m'?" in str(result.exception)


# ---- files on top of recipes and of other files ----


@pytest.mark.parametrize("name", ["mine.yaml", "mopd_sd35m.yaml"])  # also one that is named as the recipe is
def test_a_users_file_extends_a_shipped_recipe(tmp_path: Path, name: str) -> None:
    text = "tasks: {ocr: {teacher: /mine, prompts: {limit: 3}}, geneval: null}\nstudent: {kind: full}\n"
    extended = distil(write(tmp_path / name, f"extends: mopd_sd35m\n{text}"))
    on_top = distil(write(tmp_path / "plain.yaml", text), recipe="mopd_sd35m")
    assert extended == on_top
    assert list(extended.tasks) == ["ocr", "aesthetic"]
    task = extended.tasks["ocr"]
    # A path alone keeps what was said about the teacher; a mapping keeps the path.
    assert (task.teacher.path, task.teacher.guidance, task.weight) == ("/mine", 4.5, 0.3333)
    assert (task.prompts.path, task.prompts.limit) == ("data/ocr/train.txt", 3)
    assert (extended.student.kind, extended.student.lora.alpha, extended.rollout.steps) == ("full", 64, 10)


def test_a_file_beside_it_comes_before_a_recipe(tmp_path: Path) -> None:
    write(tmp_path / "miniature.yaml", "extends: mopd_sd35m\nrun: {rounds: 7}\n")
    for named in ("miniature", "miniature.yaml"):
        assert distil(write(tmp_path / "a.yaml", f"extends: {named}\n")).run.rounds == 7
    with pytest.raises(UserError, match=r"extends = 'miniatur': neither a file in .* nor a shipped .* 'miniature'\?$"):
        distil(write(tmp_path / "b.yaml", "extends: miniatur\n"))


def test_null_takes_away_what_stands_below(tmp_path: Path) -> None:
    assert list(load_config("miniature", None, ["tasks.look=null"]).tasks) == ["text", "composition"]
    anchored = write(tmp_path / "a.yaml", "extends: mopd_sd35m\nanchor: /held\nrollout: {kernel: flow}\n")
    assert distil(anchored).anchor is not None
    plain = distil(write(tmp_path / "b.yaml", "extends: a\nanchor: null\nrollout: {kernel: null}\n"))
    assert (plain.anchor, plain.rollout.kernel) == (None, "euler")
    with pytest.raises(UserError, match=r"^run\.rounds: required and missing"):
        load_config("miniature", None, ["run.rounds=null"])


def test_keys_below_what_is_null_or_a_path_alone(tmp_path: Path) -> None:
    """As in the config.yaml of a run, where every key is written down."""
    file = write(tmp_path / "a.yaml", "extends: mopd_sd35m\nanchor: /held\n")
    config = distil(file, "anchor.guidance=2.5", "tasks.ocr.eval_prompts=null", "tasks.ocr.eval_prompts.path=x.txt")
    assert config.anchor is not None
    assert (config.anchor.path, config.anchor.guidance) == ("/held", 2.5)
    assert config.tasks["ocr"].eval_prompts == PromptsSection(path="x.txt")


def test_a_distillations_section_beside_teach(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^objective: only for a distillation; the section `teach`"):
        load_config("guard_sd35m_ocr", None, ["objective.target=velocity"])


# ---- paths ----


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The working folder and a folder with a config."""
    working, configs = tmp_path / "working", tmp_path / "configs"
    for folder in (working, configs):
        folder.mkdir()
    monkeypatch.chdir(working)
    return working, configs


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return run_settings(folder, folder / "out", **changes)


def test_paths_are_looked_for_beside_the_file_then_in_the_working_folder(places: tuple[Path, Path]) -> None:
    working, configs = places
    for folder in places:
        write(folder / "both" / "p.txt", "x\n")
    write(working / "here" / "p.txt", "x\n")
    write(configs / "mine.json", "{}")
    (configs / "zero3").mkdir()  # a folder is no ds_config
    (configs / "org" / "lora").mkdir(parents=True)
    named = {"tasks__one__prompts": "both/p.txt", "tasks__two__prompts": {"path": "here/p.txt"}}
    others = {"tasks__one__teacher": "org/lora", "tasks__two__teacher": "org/elsewhere", "deepspeed": "mine.json"}
    below = write_config(configs / "below.yaml", settings(working, **named, **others))
    config = distil(write(working / "top.yaml", f"extends: {below.with_suffix('')}\nrun: {{seed: 3}}\n"))
    assert config.tasks["one"].prompts.path == str(configs / "both" / "p.txt")
    assert config.tasks["two"].prompts.path == "here/p.txt"
    assert locate(config.tasks["two"].prompts, "x") == working / "here" / "p.txt"
    assert config.tasks["one"].teacher.path == str(configs / "org" / "lora")
    assert config.tasks["two"].teacher.path == "org/elsewhere"  # on the hub, if anywhere
    assert config.deepspeed == str(configs / "mine.json")
    assert distil(below, "deepspeed=zero3", "tasks.one.prompts=both/p.txt").tasks["one"].prompts.path == "both/p.txt"
    assert distil(write_config(configs / "c.yaml", settings(working, deepspeed="zero3"))).deepspeed == "zero3"


def test_errors_name_both_places(places: tuple[Path, Path]) -> None:
    working, configs = places
    named = {"tasks__one__teacher": "./gone", "tasks__one__prompts": "gone.txt", "deepspeed": "gone.json"}
    config = distil(write_config(configs / "a.yaml", settings(working, **named)))
    tried = f"in {configs} or in {working}"
    with pytest.raises(UserError, match=rf"teacher = './gone': no such file or folder {tried};"):
        resolve_path(config.tasks["one"].teacher.path, "teacher")
    with pytest.raises(UserError, match=rf"prompts = 'gone.txt': no such file {tried};"):
        locate(config.tasks["one"].prompts, "prompts")
    with pytest.raises(UserError, match=rf"deepspeed = 'gone.json': no such file {tried};"):
        resolve_ds_config(config.deepspeed, "deepspeed")


@pytest.mark.parametrize("key", ["tasks.one.teacher", "tasks.one.prompts", "model.path"])
def test_a_placeholder_is_refused_until_it_is_set(tiny_world: Path, tmp_path: Path, key: str) -> None:
    data = settings(tiny_world) | {"run": {"rounds": 1, "output_dir": str(tmp_path)}}
    section, name = (data["model"], "path") if key == "model.path" else (data["tasks"]["one"], key.split(".")[-1])
    section[name] = "<your own>"
    file = write_config(tmp_path / "a.yaml", data)
    result = CliRunner().invoke(app, ["train", "--config", str(file), "--dry-run"])
    assert isinstance(result.exception, UserError)
    assert f"{key}" in str(result.exception)
    assert "= '<your own>' stands for something of your own: give --set" in str(result.exception)
