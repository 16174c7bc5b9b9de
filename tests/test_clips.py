"""Videos from the model to rewards and people: whole clips for those that take them, frames for the others."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.sections import RewardSection
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.clips import frames_of
from opd_ds.evaluation.store import PictureStore
from opd_ds.evaluation.tables import comparison_grid
from opd_ds.models.wan import Wan
from opd_ds.rewards import Clip, Needs, OfClips, build
from opd_ds.rewards.server import make_app
from opd_ds.rewards.wire import encode_request
from opd_ds.runs.rewards import build_rewards
from opd_ds.runs.train import train
from opd_ds.testing.tiny import wan
from tests.rewards.servers import running
from tests.tiny import ALL_SHARDED

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "my_rewards.py"


def grey(*levels: int, fps: float = 16.0, size: tuple[int, int] = (12, 8)) -> Clip:
    return Clip(tuple(Image.new("RGB", size, (level,) * 3) for level in levels), fps)


def levels(clip: Any) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in clip.frames]


class Level:
    """An image's red, NaN of black ones; the prompt's length and the metadata's `plus` are added."""

    name = "level"
    needs: ClassVar[Needs] = Needs()

    def identity(self) -> dict[str, Any]:
        return {"engine": "red"}

    def score(self, images: list[Any], prompts: list[str], metadata: Any = None) -> torch.Tensor:
        found = [float(image.getpixel((0, 0))[0]) or torch.nan for image in images]
        plus = [0] * len(images) if metadata is None else [one["plus"] for one in metadata]
        return torch.tensor([one + len(p) + more for one, p, more in zip(found, prompts, plus, strict=True)])


class Length(Level):
    """A clip's length in seconds; `seen` are its frames."""

    name, takes_clips = "length", True

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def score(self, images: list[Any], prompts: list[str], metadata: Any = None) -> torch.Tensor:
        self.seen += map(levels, images)
        return torch.tensor([len(clip.frames) / clip.fps for clip in images])


def test_a_reward_of_images_gives_the_mean_over_the_frames_that_have_a_score() -> None:
    clips, prompts = [grey(10, 20, 60), grey(4), grey(0, 50), grey(0, 0)], ["", "abc", "", ""]
    reward = OfClips(Level())
    assert reward.score(clips, prompts)[:3].tolist() == [30, 7, 50]
    assert reward.score(clips, prompts)[3].isnan()
    assert reward.score(clips[:2], prompts[:2], [{"plus": 1}, {"plus": 2}]).tolist() == [31, 9]
    assert reward.identity() == {"engine": "red", "frames": "all"}
    # The middles of halves and of thirds; a clip without so many is taken as it is.
    assert OfClips(Level(), 2).score([grey(10, 20, 30, 40, 50, 60, 70, 80), grey(8)], ["", ""]).tolist() == [50, 8]
    assert levels(grey(1, 2, 3, 4, 5, 6, 7, 8, 9).spread(3)) == [2, 5, 8]
    assert levels(grey(1, 2, 3, 4, 5).spread(1)) == [3]
    assert OfClips(Level(), 2).identity() == {"engine": "red", "frames": 2}
    broken = OfClips(Level())
    broken._reward.score = lambda *_: torch.zeros(1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="3 frames got scores of shape"):
        broken.score([grey(1, 2, 3)], [""])


def test_a_reward_of_clips_gets_them_whole_and_as_long_with_fewer_frames() -> None:
    reward = Length()
    assert OfClips(reward).score([grey(1, 2, 3, 4)], [""]).tolist() == [0.25]
    assert OfClips(reward, 2).score([grey(1, 2, 3, 4)], [""]).tolist() == [0.25]
    assert reward.seen == [[1, 2, 3, 4], [2, 4]]


def test_the_example_of_the_docs_takes_clips_and_a_mix_with_it_does(tmp_path: Path) -> None:
    file = shutil.copy(EXAMPLE, tmp_path / "my_rewards.py")
    stillness = build(f"{file}:stillness")
    clips = [grey(51, 51, 51), grey(0, 255, 0)]
    assert stillness.score(clips, ["", ""]).tolist() == pytest.approx([0, -1])
    blueness = {"reward": f"{file}:blueness", "weight": 10}
    mix = build("mix", parts={"still": {"reward": f"{file}:stillness", "weight": 2}, "blue": blueness})
    blue = Clip(tuple(Image.new("RGB", (4, 4), (0, 0, level)) for level in (0, 255)), 8.0)
    assert mix.score([*clips, blue], [""] * 3).tolist() == pytest.approx([0, -2, 5 - 2 * 29 / 255], abs=1e-3)


def test_rewards_of_a_run_fit_what_its_model_draws(tmp_path: Path) -> None:
    file = shutil.copy(EXAMPLE, tmp_path / "my_rewards.py")
    still, blue = f"{file}:stillness", f"{file}:blueness"
    base = wan.write(tmp_path / "base")

    def rewards(drawn: int, name: str, **more: Any) -> Any:
        family = Wan(base, dtype=torch.float32, device=torch.device("cpu"), height=16, width=16, frames=drawn)
        return build_rewards({"it": RewardSection(name=name, label="it", **more)}, family)["it"]

    assert rewards(5, blue, frames=2).identity()["frames"] == 2
    assert rewards(5, still).score([grey(1, 1)], [""]).tolist() == [0]
    assert rewards(1, blue).score([Image.new("RGB", (2, 2), "red")], [""]).tolist() == [-1]
    with pytest.raises(UserError, match=r"it: .*:stillness takes clips, the model draws images"):
        rewards(1, still)
    with pytest.raises(UserError, match="it: frames = 3: the model draws images"):
        rewards(1, blue, frames=3)


def test_clips_over_http() -> None:
    clips = [grey(1, 2, 3), grey(9, 9, fps=4.0)]
    served = Length()
    with running(make_app(served)) as url:
        remote = build("remote", url=url)
        assert OfClips(remote).score(clips, ["a", "b"], [{}, {}]).tolist() == [3 / 16, 0.5]
        assert served.seen == [[1, 2, 3], [9, 9]]
        assert requests.get(f"{url}/info", timeout=5).json()["takes_clips"] is True

        def refused(body: bytes) -> str:
            reply = requests.post(f"{url}/score", data=body, timeout=5)
            assert reply.status_code == 400
            return reply.json()["error"]

        images = encode_request([clips[0].frames[0]], ["a"], None)
        assert "this reward scores clips" in refused(images)
        both = json.loads(images) | json.loads(encode_request(clips[:1], ["a"], None))
        assert "this reward scores clips" in refused(json.dumps(both).encode())
        assert "clips.0.frames" in refused(json.dumps({"clips": [{"frames": [], "fps": 1}], "prompts": ["a"]}).encode())
        assert "differ in number" in refused(encode_request(clips, ["a"], None))
    with running(make_app(Level())) as url:  # a client or server from before clips sees nothing of them
        assert requests.get(f"{url}/info", timeout=5).json() == {"name": "level", "identity": {"engine": "red"}}
        assert json.loads(images).keys() == {"images", "prompts", "metadata"}
        assert OfClips(build("remote", url=url)).score(clips, ["", ""]).tolist() == [2, 9]
        reply = requests.post(f"{url}/score", data=encode_request(clips, ["", ""], None), timeout=5)
        assert (reply.status_code, "scores images" in reply.json()["error"]) == (400, True)


@pytest.mark.parametrize("shown", [(1, 2, 3), (5, 5, 7, 7, 7, 9, 9), (4, 4, 4), (4,)])
def test_a_stored_clip_comes_back_as_it_was_and_plays(tmp_path: Path, shown: tuple[int, ...]) -> None:
    store, file = PictureStore(tmp_path), Path("m/s/00000-0.png")
    clip = grey(*shown, fps=24.0)
    store.write(file, clip, {"prompt": "a"})
    assert store.finished(file, {"prompt": "a"})
    found = store.read(file)
    assert isinstance(found, Clip)
    assert levels(found) == list(shown)
    assert found.fps == 24.0
    with Image.open(tmp_path / file) as picture:
        assert getattr(picture, "is_animated", False) == (len(set(shown)) > 1)


def test_a_grid_of_clips_is_a_smaller_clip() -> None:
    clips = [grey(*range(8, 48), size=(600, 300)), grey(*range(208, 248), size=(600, 300))]
    grid = comparison_grid({"base": {"one": clips}, "student": {"one": clips}}, {"one": ["a", "b"]}, {})
    assert isinstance(grid, Clip)
    assert (len(grid.frames), grid.fps) == (24, 16 * 24 / 40)
    assert grid.frames[0].width < 2 * 256 + 200
    colours = [grid.frames[k].getpixel((160, 60)) for k in (0, 23)]
    assert colours == [clips[0].spread(24).frames[k].getpixel((0, 0)) for k in (0, 23)]


def test_a_run_with_videos_scores_stores_and_shows_them(tmp_path: Path, group: Group) -> None:
    file = shutil.copy(EXAMPLE, tmp_path / "my_rewards.py")
    base = wan.write(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a red 3\na blue 5\n")
    prompts = str(tmp_path / "prompts.txt")
    rewards = [f"{file}:stillness", {"name": f"{file}:blueness", "frames": 2}]
    task = {"teacher": str(wan.write(tmp_path / "teacher", 1)), "prompts": prompts, "eval_prompts": prompts}
    config = {
        "run": {"rounds": 2, "output_dir": str(tmp_path / "out"), "image_every": 1},
        "model": {"family": "wan", "path": str(base), "height": 16, "width": 32, "frames": 5, "max_text_length": 10},
        "precision": "fp32",
        "deepspeed": ALL_SHARDED,
        "rollout": {"samples": 2, "steps": 2, "guidance": 1.0},
        "tasks": {"it": task | {"rewards": rewards}},
        "evaluation": {"steps": 2, "baselines": False},
        "watch": {"every": 1},
    }
    train(DistilConfig.model_validate(config), group)
    out = tmp_path / "out"
    clip = PictureStore(out / "eval" / "images" / "student" / "it").read(Path("00001-0.png"))
    assert isinstance(clip, Clip)
    assert (len(clip.frames), clip.frames[0].size, clip.fps) == (5, (32, 16), 16)
    results = json.loads((out / "eval" / "results.json").read_text())
    found = results["scores"]["student"]["it"]
    assert found["stillness"]["per_prompt"][1] == pytest.approx(build(rewards[0]).score([clip], [""])[0].item())
    blue = build(f"{file}:blueness").score(list(clip.spread(2).frames), ["", ""]).mean().item()
    assert found["blueness"]["per_prompt"][1] == pytest.approx(blue)
    watched = [json.loads(line) for line in (out / "rewards.jsonl").read_text().splitlines()]
    assert {(row["source"], row["label"]) for row in watched if row["mean"] is not None} == {
        (source, label) for source in ("held_out", "rollout") for label in ("stillness", "blueness")
    }
    with Image.open(out / "grid.png") as grid:
        assert grid.n_frames == 5
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    for tag in ("student", "models"):
        with Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)) as shown:
            assert (shown.format, shown.n_frames) == ("GIF", 5)
    report = (out / "eval" / "report.html").read_text()
    assert "Clips</h2>" in report
    assert frames_of(clip) == clip.frames
