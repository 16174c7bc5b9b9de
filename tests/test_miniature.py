"""The embedded world: what ships is whole, the rewards measure what they say, the build builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from opd_ds.config.loading import load_config
from opd_ds.data import PromptSet
from opd_ds.engine import Group
from opd_ds.evaluation.pictures import to_image
from opd_ds.miniature import assets, reader, verify, world
from opd_ds.miniature.build import BASE, BuildSettings, build
from opd_ds.miniature.build_base import BaseSettings, Phase
from opd_ds.miniature.networks import Sizes
from opd_ds.rewards import build as build_reward

NAMES = list(world.COLOURS)


@pytest.fixture(scope="module")
def real() -> world.Batch:
    """Clean images of digits that neither reader nor models have seen."""
    strokes = world.load_strokes()["reader_test"]
    return world.random_pictures(*strokes, 400, torch.Generator().manual_seed(3), soiled=0.0)


def scenes(batch: world.Batch) -> list[world.Scene]:
    rows = zip(batch.digit.tolist(), batch.ink.tolist(), batch.ground.tolist(), strict=True)
    return [world.Scene(digit, NAMES[ink], NAMES[ground]) for digit, ink, ground in rows]


def look(pictures: torch.Tensor) -> float:
    return float(build_reward("miniature_look").score([to_image(p) for p in pictures], [""] * len(pictures)).mean())


def test_the_shipped_assets_are_whole_and_small() -> None:
    verify(assets())
    assert sum(path.stat().st_size for path in assets().rglob("*")) < 14e6


def test_a_changed_asset_is_found(tmp_path: Path) -> None:
    folder = shutil.copytree(assets(), tmp_path / "assets")
    (folder / "prompts" / "text" / "test.txt").write_text("a red 3 on blue\n")
    with pytest.raises(ValueError, match=r"text/test\.txt is missing or differs"):
        verify(folder)


def test_diffusers_draws_with_the_base() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(assets() / BASE)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red 3 on blue", num_inference_steps=4, height=16, width=16, max_sequence_length=10).images[0]
    assert picture.size == (16, 16)
    assert 1e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 2e6


def test_specialists_are_ahead_on_their_own_task(real: world.Batch) -> None:
    """As recorded by the build, on held-out prompts."""
    scores = json.loads((assets() / "report.json").read_text())["scores"]
    for task in world.TASKS:
        assert scores[f"teacher:{task}"][task] > scores["base"][task] + 0.15
    # Half of the way from the base to real drawings, by the reward that nothing plainer has (below).
    assert scores["teacher:look"]["look"] > (scores["base"]["look"] + look(real.pictures)) / 2
    teachers = load_config("miniature", None, []).teachers
    assert [teacher.guidance for teacher in teachers.values()] == [1.0, 1.0, 1.0]  # as they were made


def test_prompts_parse_and_test_prompts_are_held_out() -> None:
    for name, task in load_config("miniature", None, []).tasks.items():
        trained = PromptSet.read(task.prompts).prompts
        held_out = PromptSet.read(task.eval_prompts).prompts
        assert not set(trained) & set(held_out)
        assert len(trained) == 240
        assert len(held_out) == 60
        for prompt in (*trained, *held_out):
            scene = world.parse(prompt)
            assert scene is not None
            assert scene.prompt(name) == prompt


def test_the_world_is_deterministic() -> None:
    strokes = world.load_strokes()["world"]
    first, second = (
        world.random_pictures(*strokes, 8, torch.Generator().manual_seed(1), soiled=0.5).pictures for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_reader_reads_digits_it_has_not_seen(real: world.Batch) -> None:
    with torch.no_grad():
        read = reader.load_reader(assets())(real.pictures).argmax(1)
    assert float((read == real.digit).float().mean()) > 0.95


@pytest.mark.parametrize("name", ["miniature_text", "miniature_composition"])
def test_rewards_tell_right_from_wrong(real: world.Batch, name: str) -> None:
    reward, images, asked = build_reward(name), [to_image(p) for p in real.pictures], scenes(real)
    right = reward.score(images, [scene.prompt("text") for scene in asked])
    swapped = [world.Scene((s.digit + 1) % 10, s.ground, s.ink) for s in asked]
    wrong = reward.score(images, [scene.prompt("text") for scene in swapped])
    assert float(right.mean()) > 0.9
    assert float(wrong.mean()) < 0.05
    assert right.shape == (400,)
    assert right.dtype == torch.float32


def test_what_cannot_be_judged_is_nan(real: world.Batch) -> None:
    images = [to_image(p) for p in real.pictures[:2]]
    for name in ("miniature_text", "miniature_composition"):
        score = build_reward(name).score(images, ["a cat", scenes(real)[1].prompt("look")])
        assert torch.isnan(score).tolist() == [True, False]


def test_look_falls_with_every_kind_of_dirt(real: world.Batch) -> None:
    clean = look(real.pictures)
    assert clean > 0.85
    generator = torch.Generator().manual_seed(0)
    soiled = [look(world.soil(real.pictures, torch.full((400,), s), generator)) for s in (0.02, 0.05, 0.1, 0.2)]
    assert [clean, *soiled] == sorted([clean, *soiled], reverse=True)
    assert soiled[-1] < 0.1
    mean = real.pictures.mean((2, 3), keepdim=True)
    faded = [look(mean + k * (real.pictures - mean)) for k in (0.7, 0.5, 0.3)]
    assert [clean, *faded] == sorted([clean, *faded], reverse=True)


def test_nothing_plainer_looks_better_than_real_drawings(real: world.Batch) -> None:
    """Whole pictures that a model could learn to draw for every prompt, all in the palette's own colours."""
    ink, ground = (world.palette()[rows] for rows in (real.ink, real.ground))

    def drawn(mask: torch.Tensor) -> torch.Tensor:
        return world.paint(mask.expand(400, world.SIZE, world.SIZE), ink, ground)

    stripe, blob, blotch = torch.zeros(3, world.SIZE, world.SIZE)
    stripe[:, 6:10] = 1
    blob[3:13, 5:11] = 1
    blotch[:, :8] = 1
    generator = torch.Generator().manual_seed(0)
    mask = (real.pictures - ground[:, :, None, None]).square().sum(1).sqrt()
    mask = mask / mask.amax((1, 2), keepdim=True)
    plain = {
        "pale": drawn(0.7 * mask),
        "blurred": drawn(F.avg_pool2d(mask, 3, 1, 1)),
        "empty": drawn(torch.zeros(())),
        "stripe": drawn(stripe),
        "blob": drawn(blob),
        "blotch": drawn(blotch),
        "speckle": drawn((torch.rand(400, world.SIZE, world.SIZE, generator=generator) > 0.7).float()),
        "negative": 1 - real.pictures,
    }
    scores = {name: look(pictures) for name, pictures in plain.items()}
    assert look(drawn(mask)) > 0.85  # so the mask is the drawing's
    assert max(scores.values()) < 0.4, scores


def test_the_base_draws_prompts_for_all_tasks_as_it_draws_others() -> None:
    """Though it was trained on none of them. The same scenes from the same noise, in another task's words."""
    config = load_config("miniature", None, [])
    prompts = list(PromptSet.read(config.probes[world.ALL_TASKS].eval_prompts).prompts)
    asked = [scene for scene in map(world.parse, prompts) if scene is not None]
    assert [scene.prompt(world.ALL_TASKS) for scene in asked] == prompts
    assert len(prompts) == 60
    trained = {prompt for task in config.tasks.values() for prompt in PromptSet.read(task.prompts).prompts}
    assert not trained & set(prompts)
    pipeline = StableDiffusion3Pipeline.from_pretrained(assets() / BASE)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    size = {"height": world.SIZE, "width": world.SIZE, "max_sequence_length": 10}
    drawn, others = (
        pipeline(words, latents=noise, num_inference_steps=10, guidance_scale=1.0, **size).images
        for words in (prompts, [scene.prompt("text") for scene in asked])
    )
    for task in world.TASKS:
        reward = build_reward(f"miniature_{task}")
        assert float(reward.score(drawn, prompts).mean()) > 0.9 * float(reward.score(others, prompts).mean())


def test_all_tasks_at_once_is_the_product_of_the_three(real: world.Batch) -> None:
    images, prompts = [to_image(p) for p in real.pictures[:40]], [s.prompt(world.ALL_TASKS) for s in scenes(real)[:40]]
    parts = torch.stack([build_reward(f"miniature_{task}").score(images, prompts) for task in world.TASKS])
    torch.testing.assert_close(build_reward("miniature_all").score(images, prompts), parts.prod(0))
    assert float(parts.prod(0).mean()) > 0.8


@pytest.mark.extended
def test_the_build_makes_a_whole_world(tmp_path: Path, group: Group) -> None:
    """A few steps of every stage; a second call makes nothing again."""
    settings = BuildSettings(
        reader_steps=3,
        vae_pictures=80,
        sizes=Sizes(layers=1, head_dim=8, text_width=32, vae_channels=(8, 8)),
        base=BaseSettings(vae_steps=3, phases=(Phase(3, 1e-3, 0.5, 0.5),), batch=8, pool=80),
        teach=(
            "run.rounds=1",
            "rollout.samples=8",
            "rollout.steps=4",
            "evaluation.steps=2",
            "evaluation.samples_per_prompt=1",
        ),
        log=lambda text: None,
    )
    report = build(tmp_path / "world", group, settings=settings)
    assert report["scores"].keys() == {"base", *(f"teacher:{task}" for task in world.TASKS)}
    verify(tmp_path / "world")
    assert {path.name for path in (tmp_path / "world" / "teachers" / "look").iterdir()} == {
        "transformer",
        "scheduler",
        "scores.json",
    }
    hashes = (tmp_path / "world" / "SHA256SUMS").read_text()
    build(tmp_path / "world", group, settings=settings)
    assert (tmp_path / "world" / "SHA256SUMS").read_text() == hashes
