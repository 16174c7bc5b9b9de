"""Reference pictures: how prompt sets hold them, what is refused, and how they become what a network sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pyarrow import parquet
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.sections import PromptsSection
from opd_ds.data import PromptSet
from opd_ds.errors import UserError
from opd_ds.testing.tiny.parts import painting
from opd_ds.utils.pictures import Picture


def stored(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def read(path: Path, **chosen: Any) -> PromptSet:
    return PromptSet.read(PromptsSection(path=str(path), **{"pictures": "image"} | chosen), "tasks.one.prompts")


def loaded(content: bytes) -> Image.Image:
    return Picture.find(content, "row 1", "image").load()


# ---- where they are ----


@pytest.fixture
def two(tmp_path: Path) -> list[bytes]:
    """Two pictures in a folder beside the prompt files."""
    contents = [stored(painting(number, (40 + number, 30))) for number in range(2)]
    (tmp_path / "pictures").mkdir()
    for number, content in enumerate(contents):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(content)
    return contents


def write_jsonl(folder: Path, contents: list[bytes]) -> Path:
    rows = [{"prompt": f"edit {number}", "image": f"pictures/{number}.png", "tag": "x"} for number in range(2)]
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_csv(folder: Path, contents: list[bytes]) -> Path:
    file = folder / "a.csv"
    file.write_text("prompt,image,tag\nedit 0,pictures/0.png,x\nedit 1,pictures/1.png,x\n")
    return file


def table(images: list[Any]) -> dict[str, list[Any]]:
    return {"prompt": ["edit 0", "edit 1"], "image": images, "tag": ["x", "x"]}


def write_bytes(folder: Path, contents: list[bytes]) -> Path:
    parquet.write_table(pa.table(table(contents)), folder / "a.parquet")
    return folder / "a.parquet"


def write_structs(folder: Path, contents: list[bytes]) -> Path:
    """As `datasets` writes its images: one with bytes, one with a path alone."""
    images = [{"bytes": contents[0], "path": "elsewhere.png"}, {"bytes": None, "path": "pictures/1.png"}]
    parquet.write_table(pa.table(table(images)), folder / "a.parquet")
    return folder / "a.parquet"


def save_data_set(folder: Path, contents: list[bytes], feature: Any, images: list[Any]) -> Path:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "image": feature, "tag": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(table(images), features=features).save_to_disk(str(folder / "set"))
    return folder / "set"


SOURCES: dict[str, Callable[[Path, list[bytes]], Path]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet bytes": write_bytes,
    "parquet structs": write_structs,
    "images of datasets": lambda folder, contents: save_data_set(
        folder, contents, datasets.Image(), [{"bytes": content, "path": None} for content in contents]
    ),
    "lists of datasets": lambda folder, contents: save_data_set(
        folder, contents, datasets.List(datasets.Image()), [[{"bytes": content, "path": None}] for content in contents]
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_pictures_are_read_from_every_kind_of_set(tmp_path: Path, two: list[bytes], source: str) -> None:
    found = read(SOURCES[source](tmp_path, two))
    assert found.prompts == ("edit 0", "edit 1")
    assert [[picture.size for picture in own] for own in found.pictures] == [[(40, 30)], [(41, 30)]]
    assert [own[0] for own in found.pictures] == [Picture.find(content, "", "") for content in two]
    assert found.metadata == ({"tag": "x"},) * 2
    assert found.sha256 == read(write_csv(tmp_path, two)).sha256


def test_several_pictures_of_a_prompt(tmp_path: Path, two: list[bytes]) -> None:
    rows = [
        {"prompt": "a", "image": ["pictures/0.png", "pictures/1.png"]},
        {"prompt": "b", "image": "pictures/1.png", "more": "pictures/0.png"},
        {"prompt": "c", "image": "pictures/1.png", "more": None},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"more": None} | row) + "\n" for row in rows))
    found = read(file, pictures=["image", "more"])
    assert [[picture.size[0] for picture in own] for own in found.pictures] == [[40, 41], [41, 40], [41]]


def test_rows_are_repeats_when_prompt_and_pictures_are(tmp_path: Path, two: list[bytes]) -> None:
    names = ["0", "1", "0"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "image": f"pictures/{name}.png"}) + "\n" for name in names))
    assert read(file).repeats == 1
    assert len(read(file, unique=True)) == 2
    before = read(file).sha256
    (tmp_path / "pictures" / "1.png").write_bytes(stored(painting(7, (41, 30))))
    assert read(file).sha256 != before


# ---- what they hold ----


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(painting(0, (40, 30)), kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    picture, upright = Picture.find(content, "row 1", "image"), ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert picture.size == upright.size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(np.asarray(picture.load()), np.asarray(upright))


def test_transparency_is_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    assert [loaded(stored(image)).getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]
    palette = image.convert("RGB").quantize(2)
    seen = loaded(stored(palette, transparency=palette.getpixel((0, 0))))
    assert seen.getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(loaded(stored(grey)))[0, :, 0].tolist() == [0, 100, 255]
    cmyk = loaded(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"))
    red, green, blue = np.asarray(cmyk).reshape(-1, 3).mean(0)
    assert red > 200
    assert max(green, blue) < 60
    for mode in ("1", "L", "P", "LA", "YCbCr"):
        kind = "tiff" if mode == "YCbCr" else "png"
        assert loaded(stored(painting(0).convert(mode), kind)).mode == "RGB"


def animation() -> bytes:
    return stored(painting(0), "gif", save_all=True, append_images=[painting(1)])


BAD: dict[str, tuple[object, str]] = {
    "missing": ("pictures/none.png", r"image = 'pictures/none\.png': no such file"),
    "a folder": ("pictures", r"image = 'pictures': damaged, or cannot be read \(Is a directory\)"),
    "no picture": (b"prompt\n", "no picture that Pillow knows"),
    "cut off in its header": (stored(painting(0))[:20], "damaged, or cannot be read|no picture"),
    "an animation": (animation(), "an animation or stack of 2 pictures; give one of them"),
    "floats": (stored(painting(0).convert("F"), "tiff"), r"32 bits a channel \(Pillow's mode F\); convert it"),
    "100 million pixels": (stored(Image.new("1", (10_000, 10_000))), "10000 x 10000 pixels; the most is 89 million"),
    "nothing": (None, "has no picture under 'image'; prompts without pictures are a set of their own"),
    "an empty list": ([], "has no picture under 'image'"),
    "nothing in a list": (["pictures/0.png", None], "image = None: needs the path of a picture"),
    "a number": (3, "image = 3: needs the path of a picture, its bytes, or a list of these"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_refused_with_row_and_name(tmp_path: Path, two: list[bytes], kind: str) -> None:
    value, said = BAD[kind]
    file = tmp_path / "a.jsonl"
    if isinstance(value, bytes):
        (tmp_path / "bad.png").write_bytes(value)
        value = "bad.png"
    rows = [{"prompt": "good", "image": "pictures/0.png"}, {"prompt": "bad", "image": value}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"tasks.one.prompts: prompt file {file}, line 2: .*({said})") as error:
        read(file)
    assert "\n" not in str(error.value)


def test_a_column_that_is_not_there_is_refused(tmp_path: Path, two: list[bytes]) -> None:
    with pytest.raises(UserError, match=r"line 1: has no 'photo', which `pictures` names; there are 'image', 'prompt'"):
        read(write_jsonl(tmp_path, two), pictures="photo")
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match="has no columns to choose from; remove column, pictures"):
        read(tmp_path / "a.txt")


def test_pictures_cut_off_in_the_middle_are_found_by_the_check(tmp_path: Path, two: list[bytes]) -> None:
    """A run's start reads headers on all ranks, and decodes on one."""
    cut = tmp_path / "pictures" / "1.png"
    cut.write_bytes(stored(painting(1, (400, 300)))[:-2000])
    file = write_jsonl(tmp_path, two)
    result = CliRunner().invoke(app, ["data", "check", str(file), "--set", "pictures=image"])
    assert result.exit_code == 1
    assert re.search(r"pictures +2\n", result.stdout)
    assert re.search(r"line 2: image = 'pictures/1\.png': damaged, or cannot be read \(.*truncated", result.stdout)
    picture = read(file).pictures[1][0]
    with pytest.raises(UserError, match=r"line 2: image = 'pictures/1\.png': damaged"):
        picture.load()
    cut.write_bytes(two[1])
    with pytest.raises(UserError, match=r"line 2: image = .*: has changed since the prompts were read"):
        picture.load()
