"""The miniature that edits: its edits and their reward, the build, the recipes, and the bench that runs them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from benchmarks import edit_world
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config
from opd_ds.config.sections import PromptsSection
from opd_ds.data import PromptSet
from opd_ds.engine import Group
from opd_ds.evaluation.pictures import to_image
from opd_ds.miniature import editing, world
from opd_ds.miniature.build_base import BaseSettings, Phase
from opd_ds.miniature.build_editing import BASE, EditingSettings, build_editing
from opd_ds.miniature.networks import Sizes
from opd_ds.rewards import build as build_reward
from opd_ds.runs.train import train

RECIPES = ["miniature_editing", "miniature_editing_nft_edit", "miniature_editing_nft_composition"]


def painted(masks: torch.Tensor, ink: str, ground: str) -> list[Image.Image]:
    colours = (torch.tensor([world.COLOURS[name]] * len(masks)) for name in (ink, ground))
    return [to_image(picture) for picture in world.paint(masks, *colours)]


def test_a_recoloured_picture_is_rewarded_and_nothing_less() -> None:
    """Of drawings that neither reader nor models have seen."""
    masks, labels = (found[:100] for found in world.load_strokes()["reader_test"])
    references = [(picture,) for picture in painted(masks, "red", "white")]

    def reward(after: list[Image.Image]) -> float:
        asked = [editing.instruction("blue")] * 100
        return float(build_reward("miniature_edit").score(after, asked, None, references).mean())

    another = torch.stack([masks[labels != label][3] for label in labels])
    same = torch.stack([masks[labels == label][-1] for label in labels])
    right = reward(painted(masks, "blue", "white"))
    assert right > 0.9
    assert reward([picture for (picture,) in references]) == 0  # as it was
    assert reward(painted(masks, "blue", "yellow")) == 0  # another ground
    assert reward(painted(masks, "white", "blue")) == 0
    assert reward(painted(another, "blue", "white")) < 0.05
    assert 0.3 < reward(painted(same, "blue", "white")) < right - 0.2  # another drawing of the digit
    assert reward(painted(0.7 * masks, "blue", "white")) < right - 0.2  # pale


def test_what_is_no_edit_is_nan() -> None:
    picture, asked = Image.new("RGB", (16, 16), "red"), editing.instruction("blue")
    prompts = [asked, "recolour the digit pink", "recolour", "a red 3 on blue", asked]
    score = build_reward("miniature_edit").score([picture] * 5, prompts, None, [(), *[(picture,)] * 4])
    assert torch.isnan(score).tolist() == [True] * 4 + [False]
    assert torch.isnan(build_reward("miniature_edit").score([picture], [asked])).all()


def test_edits_change_the_ink_and_nothing_else() -> None:
    masks, _ = world.load_strokes()["world"]
    edits = editing.random_edits(masks, 50, torch.Generator().manual_seed(0), soiled=0.0)
    assert [editing.parse(prompt) for prompt in edits.prompts] == [list(world.COLOURS)[ink] for ink in edits.ink]
    references = [(to_image(picture),) for picture in edits.before]
    after = [to_image(picture) for picture in edits.after]
    assert float(build_reward("miniature_edit").score(after, edits.prompts, None, references).mean()) > 0.85


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of every stage."""
    folder = tmp_path_factory.mktemp("edit") / "world"
    settings = EditingSettings(
        Sizes(layers=2, head_dim=8, text_width=32), BaseSettings(phases=(Phase(3, 1e-3, 0.5, 0.5),), batch=8, pool=40)
    )
    build_editing(folder, settings=settings, say=lambda text: None)
    return folder


def test_the_build_makes_a_model_that_diffusers_edits_with(small_world: Path) -> None:
    sets = [
        PromptSet.read(PromptsSection(path=str(small_world / f"prompts/edit/{name}.jsonl"), pictures=("picture",)))
        for name in ("train", "test")
    ]
    assert [len(found) for found in sets] == [240, 60]
    trained, held_out = ({own[0].sha256 for own in found.pictures} for found in sets)
    assert not trained & held_out
    pipeline = FluxKontextPipeline.from_pretrained(small_world / BASE)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "max_sequence_length": 10, "guidance_scale": 1.0, "num_inference_steps": 2}
    own = sets[1].pictures[0][0].load()
    drawn = pipeline(image=own, prompt=sets[1].prompts[0], **size, max_area=256, _auto_resize=False).images[0]
    assert isinstance(drawn, Image.Image)
    assert drawn.size == own.size == (16, 16)


def options(job: edit_world.Job) -> tuple[str, list[str]]:
    """The recipe and the settings of a job."""
    arguments = list(job.arguments)
    return arguments[2], [value for key, value in pairwise(arguments) if key == "--set"]


def test_the_bench_runs_the_recipes(small_world: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of a teacher that edits, then of a student that edits and draws, with the bench's own settings."""
    monkeypatch.chdir(small_world.parent)
    few = [f"evaluation.{key}" for key in ("steps=2", "samples_per_prompt=1", "grid_prompts=1")]
    small = ["run.rounds=1", "rollout.samples=8", "rollout.steps=3", "tasks.edit.eval_prompts.limit=4", *few]
    planned = {job.name: job for job in edit_world.jobs(small)}
    for name, recipe, teachers in (
        ("teacher-edit", "miniature_editing_nft_edit", []),
        ("student", "miniature_editing", ["tasks.composition.teacher.path=./teacher-edit/export"]),
    ):
        said, settings = options(planned[name])
        assert said == recipe
        config = load_config(recipe, None, [*settings, *teachers])
        train(config, group)
        scores = json.loads((config.run.output_dir / "summary.json").read_text())["models"]["student"]
        assert scores.keys() == {"edit", "composition"}
        assert all(value is not None for value in scores.values())


def test_the_shipped_recipes_name_what_the_build_writes_by_default() -> None:
    student, edit, composition = (load_config(name, None, []) for name in RECIPES)
    assert isinstance(student, DistilConfig)
    assert student.tasks.keys() == {"edit", "composition"}
    assert {config.model.path for config in (student, edit, composition)} == {"./runs/editing/base"}
    assert student.teachers["edit"].path == f"./{edit.run.output_dir}/export"
    assert student.teachers["composition"].path == f"./{composition.run.output_dir}/export"
    assert not student.probes
    assert edit.probes.keys() == {"composition"}
    assert composition.probes.keys() == {"edit"}


def test_the_benchs_page_has_each_models_scores() -> None:
    sets = {task: {"prompts": ["a", "b"], "samples": 2} for task in edit_world.TASKS}
    scores = {
        model: {
            task: {f"miniature_{task}": {"mean": 0.1 * row + 0.01 * column, "ci95": [0.0, 0.04]}}
            for column, task in enumerate(edit_world.TASKS)
        }
        for row, model in enumerate(edit_world.MODELS)
    }
    page = edit_world.as_markdown({"sets": sets, "scores": scores}, {"world": 90.0})
    assert "| base | 0.000 ± 0.020 | 0.010 ± 0.020 |" in page
    assert "| **student** | 0.400 ± 0.020 | 0.410 ± 0.020 |" in page
    assert "| world | 1.5 |" in page
