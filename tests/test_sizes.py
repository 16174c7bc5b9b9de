"""Images of several sizes: a round is the same however it is cut, and every size has its own sigmas."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opd_ds.config.algorithms import DistilConfig, TeachConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ModelSection, PromptsSection
from opd_ds.data import PromptSet, Size, Sizes, rows_on_a_rank, shards_by
from opd_ds.data.check import describe, look_through
from opd_ds.data.sizes import nearest_size, own_size
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.tables import comparison_grid
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.memory import rows_per_rank
from opd_ds.plan.network import find_model
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.setup import prepare
from opd_ds.runs.train import train
from opd_ds.testing import family_checks as checks
from opd_ds.testing.family_checks import change
from opd_ds.testing.tiny.parts import DYNAMIC_SHIFT
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, gradients_of, metrics, write_sgd
from tests.tiny import ALL_SHARDED, PROMPTS, run_settings, with_changes, write_config

SIZES = [[16, 16], [8, 16], [16, 8]]
# Random queries, noise at every step, samples that no number of ranks divides by size.
HARD: dict[str, Any] = {
    "model__sizes": SIZES,
    "rollout__samples": 7,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.5,
    "rollout__trained_steps": {"queries": 2},
}
SHIFTED = DYNAMIC_SHIFT | {"base_image_seq_len": 4, "max_image_seq_len": 32}


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with a scheduler whose shift depends on the size, and prompts with sizes and negative prompts of
    their own.
    """
    root = tmp_path_factory.mktemp("sizes") / "world"
    shutil.copytree(tiny_world, root)
    for model in ("base", "other"):
        change(root / model / "scheduler" / "scheduler_config.json", **SHIFTED)
    own: list[dict[str, Any]] = [
        {"height": 8, "width": 16},
        {"height": "16", "width": "8", "negative_prompt": "a green 7"},
        {"negative_prompt": ""},
        {"height": None},
        {},
    ]
    rows = [{"prompt": prompt, **columns} for prompt, columns in zip(PROMPTS, own, strict=True)]
    (root / "sized.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


# ---- which size ----


def test_the_nearest_bucket_is_that_of_the_nearest_ratio() -> None:
    buckets = [Size(1024, 1024), Size(768, 1344), Size(1344, 768), Size(512, 512)]
    assert nearest_size(Size(500, 510), buckets) == Size(512, 512)
    assert nearest_size(Size(2000, 2100), buckets) == Size(1024, 1024)
    assert nearest_size(Size(720, 1280), buckets) == Size(768, 1344)
    assert nearest_size(Size(1280, 720), buckets) == Size(1344, 768)


def test_a_prompts_own_size(world: Path) -> None:
    assert own_size({"height": 8, "width": "16"}) == Size(8, 16)
    assert own_size({"height": None}) is None
    for bad in ({"height": 8}, {"height": 8, "width": 0}, {"height": 8.5, "width": 8}, {"height": True, "width": 8}):
        with pytest.raises(ValueError, match="whole numbers of pixels"):
            own_size(bad)
    family = checks.build("sd3", world / "base", height=8, width=8)
    drawn = Sizes(ModelSection(path="x", sizes=((8, 8), (8, 16))), family)
    assert {drawn.of({"height": 32, "width": 32}, (), number) for number in range(5)} == {Size(8, 8), Size(8, 16)}
    own, metadata = Sizes(ModelSection(path="x", size_from="prompts"), family), ({"height": 32, "width": 40}, {})
    assert [own.of(one, (), 3) for one in metadata] == [Size(32, 40), Size(8, 8)]
    assert own.possible([PromptSet(("a", "b"), metadata, "")]) == [Size(8, 8), Size(32, 40)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5))
def test_ranks_make_equally_many_forwards_of_one_kind_each(kinds: list[int], ranks: int) -> None:
    parts = shards_by(range(len(kinds)), kinds, ranks, len(kinds))
    held = []
    for of_ranks, shards in parts.items():
        assert len({len(part) for part in shards}) == 1
        for kind, part in zip(of_ranks, shards, strict=True):
            assert {kinds[index] for index in part.indices} == {kind}
            held += zip(part.indices, part.weights, strict=True)
    assert sorted(index for index, weight in held if weight) == list(range(len(kinds)))
    assert len(held) == ranks * rows_on_a_rank(len(kinds), ranks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__sizes": [[16, 16], [8, 18]]}, r"model\.sizes = 8x18: both must be multiples of 4"),
        ({"model__sizes": [[16, 16], [8, 48]]}, r"model\.sizes = 8x48: the network has positions for 32 pixels a side"),
        ({"model__sizes": SIZES, "model__height": 16}, "height = 16 beside sizes"),
        ({"model__sizes": [[16, 16], [16, 16]]}, r"\[16, 16\] is named twice"),
        ({"model__size_from": "prompts"}, r"prompts: prompt 1: height x width = 9x16: .*give model\.sizes"),
        ({"model__size_from": "prompts", "model__sizes": SIZES, "rows": {"width": 5}}, "prompt 1: height = None"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(
    world: Path, tmp_path: Path, group: Group, changes: dict[str, Any], said: str
) -> None:
    row = {"prompt": "a", **changes.pop("rows", {"height": 9, "width": 16})}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row) + "\n")
    settings = run_settings(world, tmp_path / "out", tasks__one__prompts=str(tmp_path / "odd.jsonl"), **changes)
    with pytest.raises((UserError, ValueError), match=said):
        prepare(DistilConfig.model_validate(settings), group)


# ---- the samplers ----


@pytest.mark.parametrize(("name", "guidance"), [("flux", 3.0), ("flux2", 3.0), ("qwen_image", 3.0), ("z_image", 3.0)])
def test_at_every_size_images_and_sigmas_are_the_pipelines(tmp_path: Path, name: str, guidance: float) -> None:
    _at_every_size(import_module(f"opd_ds.testing.tiny.{name}").write(tmp_path), name, guidance)


def test_at_every_size_sd3_with_a_dynamic_shift_is_the_pipeline(world: Path) -> None:
    _at_every_size(world / "base", "sd3", 3.0)


def _at_every_size(folder: Path, name: str, guidance: float) -> None:
    tiny = import_module(f"opd_ds.testing.tiny.{name}")
    change(folder / "scheduler" / "scheduler_config.json", **SHIFTED)
    family = checks.build(name, folder, height=16, width=16)
    pipeline, network, grids = checks.load_pipeline(family, folder), family.load_transformer(), []
    for size in (Size(16, 16), Size(8, 16), Size(16, 24)):
        sized = family.at(*size)
        drawn = checks.draw(tiny, sized, pipeline, guidance)
        grids.append(sized.sigmas(checks.STEPS))
        torch.testing.assert_close(grids[-1], pipeline.scheduler.sigmas.double(), rtol=0, atol=1e-6)
        checks.close(checks.roll_out(sized, network, guidance), drawn)
    assert all((grids[0] - grid).abs().max() > 1e-4 for grid in grids[1:])


# ---- the round ----


CUTS: dict[str, dict[str, Any]] = {
    "small micro-batches": {"train__micro_batch": 3, "rollout__micro_batch": 2, "scoring__micro_batch": 5},
    "stage 3": {"stage": 3},
    "fused": {"rollout__mode": "fused", "rollout__micro_batch": 3},
    "fused at stage 3": {"rollout__mode": "fused", "stage": 3},
}


def test_the_gradient_of_three_sizes_does_not_depend_on_how_the_round_is_cut(
    world: Path, tmp_path: Path, group: Group
) -> None:
    def gradients(stage: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
        sgd = {"optimizer": {"lr": 1.0, "max_grad_norm": 0.0}, "deepspeed": write_sgd(tmp_path, stage)}
        sgd["tasks__two__prompts"] = str(world / "sized.jsonl")
        settings = run_settings(world, tmp_path / "out", **(HARD | sgd | changes))
        return gradients_of(DistilConfig.model_validate(settings), group)

    expected = gradients()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, changes in CUTS.items():
        found = gradients(**changes)
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-5 * scale + 1e-7, f"{name}: gradients differ by {worst} at scale {scale}"


OTHER_ROUNDS: dict[str, dict[str, Any]] = {
    "several updates": {"train__updates_per_round": 2, "rollout__samples": 8},
    "seen one step earlier": {"scoring__late": 1},
    "guard": {"teach": {"algorithm": "guard", "group": 2, "kl": 0.1, "clip": 0.1}, "rollout__samples": 8},
}


@pytest.mark.parametrize("kind", OTHER_ROUNDS)
def test_other_rounds_of_three_sizes_do_not_depend_on_how_they_are_cut(
    world: Path, tmp_path: Path, group: Group, kind: str
) -> None:
    def gradients(**changes: Any) -> dict[str, torch.Tensor]:
        sgd = {"optimizer": {"lr": 0.1, "max_grad_norm": 0.0}, "deepspeed": write_sgd(tmp_path, 0)}
        data = run_settings(world, tmp_path / "out", **(HARD | sgd | OTHER_ROUNDS[kind] | changes))
        if "teach" in data:
            task = {"prompts": str(world / "sized.jsonl"), "rewards": ["jpeg_compressibility"]}
            data["tasks"] = {"one": task, "two": task}
        return gradients_of(parse_config(data), group)

    whole, cut = gradients(), gradients(**CUTS["small micro-batches"])
    scale = max(float(value.abs().max()) for value in whole.values())
    worst = max(float((cut[key] - whole[key]).abs().max()) for key in whole)
    assert scale > 0
    assert worst < 1e-5 * scale + 1e-7, f"gradients differ by {worst} at scale {scale}"


def test_every_size_is_what_a_run_of_that_size_is(
    world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample has the images that it has in a run of its size alone, with that size's noise, sigmas and weights."""
    monkeypatch.setattr(RunConfig, "shows_rollouts", lambda self, index: True)

    def first_round(**changes: Any) -> Any:
        settings = run_settings(world, tmp_path / "out", **(HARD | changes))
        return prepare(DistilConfig.model_validate(settings), group).trainer.run_round(0)

    several = first_round()
    alone = {
        (height, width): first_round(model__sizes=[], model__height=height, model__width=width)
        for height, width in SIZES
    }
    for task in ("one", "two"):
        finals = several.rolled[task].final
        sides = [(2 * latents.shape[1], 2 * latents.shape[2]) for latents in finals]
        assert set(sides) == set(alone)
        for sample, (latents, size) in enumerate(zip(finals, sides, strict=True)):
            torch.testing.assert_close(latents, alone[size].rolled[task].final[sample], rtol=0, atol=1e-5)
    wide = "".join(json.dumps({"prompt": prompt, "height": 100, "width": 210}) + "\n" for prompt in PROMPTS)
    (tmp_path / "wide.jsonl").write_text(wide)
    prompts = {f"tasks__{task}__prompts": str(tmp_path / "wide.jsonl") for task in ("one", "two")}
    snapped = first_round(model__size_from="prompts", **prompts)
    assert snapped.losses.loss == pytest.approx(alone[8, 16].losses.loss, rel=1e-5)
    assert snapped.losses.loss != pytest.approx(alone[16, 16].losses.loss, rel=1e-2)


RUNS: dict[str, dict[str, Any]] = {
    "stage 3, sharded teachers": {
        "deepspeed": ALL_SHARDED,
        "rollout__gather": "per_layer",
        "train__micro_batch": 3,
        "tasks__one__teacher__placement": "zero_inference",
    },
    "stage 3 fused": {"deepspeed": ALL_SHARDED, "rollout__mode": "fused", "rollout__micro_batch": 2},
}


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_train_three_sizes_as_one_rank_and_go_on_bit_for_bit(
    world: Path, tmp_path: Path, group: Group
) -> None:
    """Beside distillation learning from rewards, whose groups are of one size. Images of the evaluation, too."""
    changes = HARD | {"run__rounds": 2, "run__checkpoint_every": 1, "evaluation__samples_per_prompt": 2}
    changes |= {
        "tasks__two__eval_prompts": str(world / "prompts.txt"),
        "tasks__two__prompts": str(world / "sized.jsonl"),
    }
    one = DistilConfig.model_validate(run_settings(world, tmp_path / "one", deepspeed="zero0", **changes))
    train(one, group)
    whole = metrics(tmp_path / "one")
    train(one, group, str(tmp_path / "one" / "checkpoints" / "round-000001"))
    assert metrics(tmp_path / "one") == whole

    teach = _teaching(world, tmp_path / "teach-one")
    train(TeachConfig.model_validate(teach), group)
    files = [
        write_config(tmp_path / f"{name}.yaml", run_settings(world, tmp_path / name, **(changes | cut)))
        for name, cut in RUNS.items()
    ]
    files.append(write_config(tmp_path / "teach.yaml", _teaching(world, tmp_path / "teach")))
    launch(2, *map(str, files), script=TRAIN_MANY)
    for name in RUNS:
        assert_close(metrics(tmp_path / name), whole)
        assert _pictures(tmp_path / name) == _pictures(tmp_path / "one")
    for mine, other in zip(metrics(tmp_path / "teach"), metrics(tmp_path / "teach-one"), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


def _teaching(world: Path, folder: Path) -> dict[str, Any]:
    data = run_settings(world, folder, run__rounds=2)
    task = {"prompts": str(world / "sized.jsonl"), "rewards": ["jpeg_compressibility"]}
    data |= {"tasks": {"small": task}, "teach": {"algorithm": "nft", "group": 2}}
    data["rollout"] = {"samples": 10, "steps": 3, "guidance": 1.0, "micro_batch": 2}
    return with_changes(data, {"model__sizes": SIZES, "model__size_from": "prompts"})


def _pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes of an evaluation's images, by file."""
    images, found = folder / "eval" / "images", {}
    for file in sorted(images.rglob("*.png")):
        with Image.open(file) as picture:
            found[str(file.relative_to(images))] = picture.size
    return found


# ---- the evaluation ----


def test_images_and_grids_have_each_their_size(world: Path, tmp_path: Path, group: Group) -> None:
    """With three samples of three sizes a prompt is drawn in all of them; a prompt's own size comes first."""
    settings = run_settings(
        world,
        tmp_path / "out",
        model__sizes=SIZES,
        model__size_from="prompts",
        evaluation__samples_per_prompt=3,
        tasks__one__eval_prompts=str(world / "sized.jsonl"),
        tasks__two__eval_prompts=str(world / "prompts.txt"),
    )
    config = DistilConfig.model_validate(settings)
    evaluate(config, Choice(), group)
    found = _pictures(tmp_path / "out")
    assert len(found) == 3 * 2 * 5 * 3  # models, sets, prompts, samples
    for sample in range(3):
        assert found[f"base/one/00000-{sample}.png"] == (16, 8)
        assert found[f"base/one/00001-{sample}.png"] == (8, 16)
    for number in range(5):
        assert {found[f"base/two/{number:05d}-{sample}.png"] for sample in range(3)} == {(16, 16), (16, 8), (8, 16)}
    parts = prepare(config, group)
    shown = parts.evaluator.draw(parts.student.module, {"one": 2.0}, 2)["one"]
    assert [image.size for _, image in shown] == [(16, 8), (8, 16)]
    grid = comparison_grid({"student": {"one": [image for _, image in shown]}}, {"one": PROMPTS[:2]}, {})
    assert grid is not None
    white = (255, 255, 255)
    left, top = 150, 48  # of the first tile, 96 x 96: an image of 96 x 48 in its middle, then one of 48 x 96
    assert grid.getpixel((left + 48, top + 10)) == white != grid.getpixel((left + 48, top + 30))
    assert grid.getpixel((left + 102 + 10, top + 48)) == white != grid.getpixel((left + 102 + 30, top + 48))


# ---- the plan ----


def test_the_plan_takes_the_largest_size(world: Path, tmp_path: Path) -> None:
    config = DistilConfig.model_validate(run_settings(world, tmp_path / "out", model__sizes=[[8, 16], [16, 24]]))
    assert find_model(config).family.latent_shape == (4, 8, 12)
    assert rows_per_rank(config, parse_devices("4xcpu", "--gpu"), "one") == 1
    own = {"model__size_from": "prompts", "model__height": 8, "model__width": 8}
    own |= {f"tasks__{task}__prompts": str(world / "sized.jsonl") for task in ("one", "two")}
    config = DistilConfig.model_validate(run_settings(world, tmp_path / "out", **own))
    assert find_model(config).family.latent_shape == (4, 4, 8)


def test_data_check_reports_sizes_that_do_not_fit(tmp_path: Path) -> None:
    rows = [{"height": 768, "width": 1344}, {"height": 1000, "width": 1000}, {"height": "tall", "width": 16}, {}]
    file = tmp_path / "sized.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", **row}) + "\n" for row in rows))
    found = look_through(PromptsSection(path=str(file), metadata=()), "FILE")
    assert found.sizes == {Size(768, 1344): 1, Size(1000, 1000): 1}
    assert [problem.place for problem in found.odd_sizes] == ["line 2", "line 3"]
    assert not found.problems
    assert "odd sizes     2" in describe(found)
    assert "line 2: height x width = 1000x1000" in describe(found)
