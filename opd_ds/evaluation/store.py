"""Images, clips and scores on disk, so that what is finished is not done again and what changed is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from opd_ds.evaluation.clips import animation, frames_of
from opd_ds.rewards import Clip, Drawn
from opd_ds.utils.json_lines import json_line

_PNG_KEY, _CLIP_KEY = "opd_ds", "opd_ds_clip"


def digest(data: Any) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:24]


class PictureStore:
    """PNG files, each with what it was drawn from in its text: prompt, noise, model and settings, as JSON.

    A clip is one file, too: an animated PNG, which browsers play. An image or clip is finished when it is there and was
    drawn from what it would be drawn from now.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self, file: Path, recipe: dict[str, Any]) -> bool:
        """Reads the file's header only."""
        try:
            with Image.open(self._folder / file) as picture:
                return picture.info.get(_PNG_KEY) == _as_text(recipe)
        except (FileNotFoundError, UnidentifiedImageError):
            return False

    def adopt(self, file: Path, recipe: dict[str, Any], others: Iterable[PictureStore]) -> bool:
        """Take the image from one of `others` that has it finished, without a second copy on disk where links work."""
        for other in others:
            if not other.finished(file, recipe):
                continue
            target, draft = self._folder / file, (self._folder / file).with_name(f".{file.name}.writing")
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.unlink(missing_ok=True)
            try:
                os.link(other._folder / file, draft)
            except OSError:  # another file system, or one without links
                shutil.copyfile(other._folder / file, draft)
            draft.replace(target)
            return True
        return False

    def write(self, file: Path, drawn: Drawn, recipe: dict[str, Any]) -> None:
        """Under a hidden name first: a file that is there is whole."""
        target = self._folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.writing")
        text = PngInfo()
        text.add_itxt(_PNG_KEY, _as_text(recipe))
        if isinstance(drawn, Clip):
            text.add_itxt(_CLIP_KEY, json.dumps({"frames": len(drawn.frames), "fps": drawn.fps}))
        frames_of(drawn)[0].save(draft, format="png", pnginfo=text, **animation(drawn))
        draft.replace(target)

    def read(self, file: Path) -> Drawn:
        """The image or clip, RGB, in memory."""
        with Image.open(self._folder / file) as picture:
            about = picture.info.get(_CLIP_KEY)
            return picture.convert("RGB") if about is None else _clip(picture, **json.loads(about))


def _clip(picture: Image.Image, frames: int, fps: float) -> Clip:
    """Pillow writes equal neighbours as one longer frame, and a clip in which nothing moves as an image."""
    found: list[Image.Image] = []
    for place in range(getattr(picture, "n_frames", 1)):
        picture.seek(place)
        picture.load()
        found += [picture.convert("RGB")] * max(1, round(picture.info.get("duration", 0) * fps / 1000))
    return Clip((*found, *found[-1:] * (frames - len(found))), fps)


def _as_text(recipe: dict[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True)


class ScoreStore:
    """One JSON object a line: `picture` (hash of what was drawn and asked), `reward`, `by` (hash of its identity),
    `score`, `file`. Each rank appends to a file of its own; reading takes all of them.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._own = folder / f"rank-{rank:03d}.jsonl"

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows whose score is not finite are kept as null: the next start asks again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = "".join(map(json_line, rows))
        with self._own.open("ab+") as stream:
            if stream.tell() and not _ends_a_line(stream):  # a line cut off by a kill
                stream.write(b"\n")
            stream.write(text.encode())

    def read(self) -> dict[tuple[str, str, str], float]:
        """Finite scores by (image, reward, by)."""
        found = {}
        for file in sorted(self._folder.glob("rank-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill
                    continue
                if row["score"] is not None:
                    found[row["picture"], row["reward"], row["by"]] = float(row["score"])
        return found


def _ends_a_line(stream: Any) -> bool:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"
