"""Reference pictures beside drawn images: which rewards get them, of what size, and over HTTP."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import torch
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards import Clip, Needs, OfClips, build, score_beside
from opd_ds.rewards.references import at_most
from opd_ds.rewards.server import make_app
from opd_ds.rewards.wire import encode_request
from opd_ds.utils.pictures import Picture
from tests.rewards.drawing import flat
from tests.rewards.servers import running

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "my_rewards.py"


def picture(colour: str, size: tuple[int, int] = (8, 6)) -> Picture:
    stream = BytesIO()
    Image.new("RGB", size, colour).save(stream, "png")
    return Picture.find(stream.getvalue(), "row 1", "image")


class Beside:
    """How many references an image has, in thousands, plus the red of the first one; `seen` are their sizes."""

    name, takes_references = "beside", True
    needs: ClassVar[Needs] = Needs()

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, int]]] = []

    def identity(self) -> dict[str, Any]:
        return {}

    def score(self, images: list[Any], prompts: list[str], metadata: Any = None, references: Any = None) -> Any:
        self.seen += [[one.size for one in own] for own in references]
        return torch.tensor([1000.0 * len(own) + (own[0].getpixel((0, 0))[0] if own else 0) for own in references])


def test_only_rewards_that_take_pictures_have_them_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts, reward = [flat("red")] * 3, ["a", "b", "c"], Beside()
    shared = picture("red", (2000, 1000))
    pictures = [(shared,), (shared, picture("blue")), ()]
    loads: list[Picture] = []
    load = Picture.load
    monkeypatch.setattr(Picture, "load", lambda self: loads.append(self) or load(self))
    assert score_beside(reward, images, prompts, None, pictures).tolist() == [1255, 2255, 0]
    assert len(loads) == 2
    assert reward.seen == [[(1448, 724)], [(1448, 724), (8, 6)], []]
    score_beside(build("jpeg_compressibility"), images, prompts, None, pictures)
    assert len(loads) == 2


@pytest.mark.parametrize("size", [(1024, 1024), (3000, 2), (1025, 1024), (9000, 1000)])
def test_large_pictures_keep_their_proportions(size: tuple[int, int]) -> None:
    width, height = at_most(Image.new("RGB", size)).size
    assert width * height <= 2**20
    if size[0] * size[1] <= 2**20:
        assert (width, height) == size
    assert width / height == pytest.approx(size[0] / size[1], rel=0.01)


def test_frames_and_parts_of_a_mix_get_them(tmp_path: Path) -> None:
    file = shutil.copy(EXAMPLE, tmp_path / "my_rewards.py")
    unchanged = build(f"{file}:unchanged")
    grey = [flat("black"), flat("white")]
    assert unchanged.score(grey, ["", ""], None, [(grey[0],), (grey[0],)]).tolist() == [0, -1]
    assert unchanged.score(grey, ["", ""], None, [(grey[1], grey[0]), ()])[0] == -1
    assert unchanged.score(grey, ["", ""]).isnan().all()
    parts = {"kept": {"reward": f"{file}:unchanged", "weight": 2}, "blue": {"reward": f"{file}:blueness"}}
    mix, pictures = build("mix", parts=parts), [(picture("black"),), (picture("white"),)]
    assert score_beside(mix, [flat("blue"), grey[1]], ["", ""], None, pictures).tolist() == pytest.approx(
        [1 - 2 * 29 / 255, 0]
    )
    clip, reward = Clip((grey[0], grey[1]), 8.0), Beside()
    assert score_beside(OfClips(unchanged), [clip], [""], None, pictures[:1]).tolist() == [-0.5]
    assert score_beside(OfClips(reward, 1), [clip], [""], [{}], pictures[:1]).tolist() == [1000]
    assert len(reward.seen) == 1


def test_a_function_that_takes_them_has_a_fourth_parameter(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def f(images, prompts, metadata): return [0] * len(images)\nf.takes_references = 1")
    with pytest.raises(UserError, match=r"expected f\(images, prompts, metadata, references\)") as error:
        build(f"{file}:f")
    file.write_text(
        "def f(images, prompts, metadata, references, strength=1.0):\n"
        "    return [strength * len(own) for own in references]\n"
        "f.takes_references = True"
    )
    assert "\n" not in str(error.value)
    reward = build(f"{file}:f", strength=3.0)
    assert reward.score([flat("red")], ["a"], None, [(flat("red"),)]).tolist() == [3]


def test_references_over_http() -> None:
    served, images, prompts = Beside(), [flat("red"), flat("blue"), flat("red")], ["a", "b", "c"]
    shared = picture("red")
    pictures = [(shared,), (shared, picture("blue")), ()]
    with running(make_app(served)) as url:
        remote = build("remote", url=url, batch_size=2)
        assert requests.get(f"{url}/info", timeout=5).json()["takes_references"] is True
        assert score_beside(remote, images, prompts, None, pictures).tolist() == [1255, 2255, 0]
        assert served.seen == [[(8, 6)], [(8, 6), (8, 6)], []]
        own = flat("red")
        body = json.loads(encode_request(images, prompts, None, [(own,), (own, images[1]), (own,)]))
        assert (len(body["pictures"]), body["references"]) == (2, [[0], [0, 1], [0]])

        def refused(changes: dict[str, Any]) -> str:
            reply = requests.post(f"{url}/score", json=body | changes, timeout=5)
            assert reply.status_code == 400
            return reply.json()["error"]

        assert "references differ in number" in refused({"references": [[0]]})
        assert "there are 2 pictures" in refused({"references": [[0], [2], [0]]})
        assert "references.1.0" in refused({"references": [[0], [-1], [0]]})
        assert "image 3 is not a base64 PNG" in refused({"pictures": ["x", "y"]})
    plain = json.loads(encode_request(images, prompts, None))  # as servers from before know it
    assert plain.keys() == {"images", "prompts", "metadata"}
