"""Images in the proportions of the picture that they are made from: edits, and videos of a first frame."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import ModelSection
from opd_ds.config.without_effect import settings_without_effect
from opd_ds.data import Size, Sizes
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.runs.encode import encode_prompts
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.preflight import preflight
from opd_ds.runs.setup import prepare
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import flux_kontext, wan_i2v
from opd_ds.testing.tiny.parts import painting
from opd_ds.training.trainer import RolloutResult
from opd_ds.utils.pictures import Picture
from tests.tiny import run_settings, with_changes

WIDE, HIGH = (88, 64), (64, 88)  # width, height of pictures
BUCKETS = [[32, 48], [48, 32]]  # height, width of images


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("picture_sizes")
    for name, write in (("flux_kontext", flux_kontext.write), ("wan_i2v", wan_i2v.write)):
        write(root / name)
    rows = []
    for number, size in enumerate((WIDE, HIGH, WIDE, HIGH)):
        painting(number, size).save(root / f"{number}.png")
        rows.append({"prompt": f"make it {number}", "image": f"{number}.png"})
    (root / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config_of(world: Path, family: str, folder: Path, **changes: Any) -> DistilConfig:
    edits = {"path": str(world / "edits.jsonl"), "pictures": "image"}
    task = {"teacher": {"path": str(world / family)}, "prompts": edits, "eval_prompts": edits}
    wanted = {"wan_i2v": {"frames": 5}, "flux_kontext": {"reference_side": 48, "max_text_length": 24}}[family]
    data = run_settings(
        world,
        folder,
        model={"family": family, "path": str(world / family), "size_from": "pictures", **wanted},
        rollout__samples=5,
        rollout__guidance=1.0,
        rollout__trained_steps={"queries": 1},
        student={"kind": "full"},
        tasks={"edit": task},
    )
    return DistilConfig.model_validate(with_changes(data, changes))


def first_round(config: DistilConfig, group: Group) -> RolloutResult:
    return prepare(config, group).trainer.run_round(0).rolled["edit"]


@pytest.fixture(autouse=True)
def _rollouts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody looks they stop at the last trained state."""
    monkeypatch.setattr(RunConfig, "shows_rollouts", lambda self, index: True)


def picture(size: tuple[int, int]) -> Picture:
    stream = BytesIO()
    painting(0, size).save(stream, format="png")
    return Picture.find(stream.getvalue(), "prompt 1", "picture")


def test_the_size_is_that_of_the_last_picture(world: Path) -> None:
    family, wide, high = checks.build("flux_kontext", world / "flux_kontext"), picture(WIDE), picture(HIGH)
    own = Sizes(ModelSection(path="x", size_from="pictures"), family)
    width, height = family.fitted_size(WIDE)
    assert width > height
    assert own.of({}, (high, wide), 3) == Size(height, width)
    assert own.of({}, (), 3) == Size(16, 24)  # the run's
    assert own.of({"height": 8, "width": 8}, (wide,), 3) == Size(height, width)  # columns are read with `prompts`
    snapped = Sizes(ModelSection(path="x", size_from="pictures", sizes=BUCKETS), family)
    assert [snapped.of({}, (one,), 0) for one in (wide, high)] == [Size(32, 48), Size(48, 32)]
    assert snapped.each({}, (wide,)) == [Size(32, 48)]
    assert snapped.each({}, ()) == [Size(32, 48), Size(48, 32)]


def test_edits_have_the_sizes_that_their_pictures_are_resized_to(world: Path, tmp_path: Path, group: Group) -> None:
    config = config_of(world, "flux_kontext", tmp_path / "out")
    rolled, family = first_round(config, group), checks.build("flux_kontext", world / "flux_kontext")
    found = {own[0].size: tuple(final.shape) for own, final in zip(rolled.pictures, rolled.final, strict=True)}
    assert found == {size: family.at(*family.fitted_size(size)[::-1]).latent_shape for size in (WIDE, HIGH)}
    drawn = evaluate(config, Choice(), group, lambda *_: None)
    files = (tmp_path / "out" / "eval" / "images").rglob("*.png")
    sizes = {Image.open(file).size for file in files}
    assert sizes == {family.fitted_size(size) for size in (WIDE, HIGH)}, drawn["models"]


@pytest.mark.parametrize("chosen", ["drawn", "pictures"])
def test_a_video_of_each_bucket_is_that_of_a_run_of_its_size(
    world: Path, tmp_path: Path, group: Group, chosen: str
) -> None:
    """Its first frame is resized to the bucket, and found in the cache in the size of the bucket."""
    config = config_of(world, "wan_i2v", tmp_path / "out", model__sizes=BUCKETS, model__size_from=chosen)
    several = first_round(config, group)
    alone = {
        (height, width): first_round(
            config_of(world, "wan_i2v", tmp_path / "one", model__height=height, model__width=width,
                      model__size_from="drawn"),
            group,
        )
        for height, width in BUCKETS
    }  # fmt: skip
    met = set()
    for number, (final, own) in enumerate(zip(several.final, several.pictures, strict=True)):
        size = final.shape[-2] * 8, final.shape[-1] * 8
        met.add(size)
        assert chosen == "drawn" or (size[1] > size[0]) == (own[0].size == WIDE)
        torch.testing.assert_close(final, alone[size].final[number], rtol=0, atol=1e-5)
    assert len(met) == 2
    encode_prompts(config, group)
    cached = config_of(
        world, "wan_i2v", tmp_path / "out", model__sizes=BUCKETS, model__size_from=chosen,
        model__text_encoders="cached",
    )  # fmt: skip
    preflight(cached, group, group.world, None)
    for final, again in zip(several.final, first_round(cached, group).final, strict=True):
        torch.testing.assert_close(final, again, rtol=0, atol=1e-5)


def test_refusals(world: Path, tmp_path: Path, tiny_world: Path, group: Group) -> None:
    config = config_of(world, "wan_i2v", tmp_path / "out")
    with pytest.raises(UserError, match=r"'wan_i2v' resizes pictures to the size that is drawn; give model\.sizes"):
        preflight(config, group, group.world, None)
    plain = DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", model__size_from="pictures"))
    with pytest.raises(UserError, match=r"model\.family = 'sd3' takes no reference pictures"):
        preflight(plain, group, group.world, None)
    assert any("no prompt set has pictures" in line for line in settings_without_effect(plain))
