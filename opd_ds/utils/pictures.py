"""Reference pictures as they are found: files, or bytes in a table. What is wrong with one is one sentence."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from opd_ds.errors import UserError, about, shortened

MOST_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_NO_PICTURE = ("I", "F")  # 32-bit integers and floats have no range that could be shown


@dataclass(frozen=True)
class Picture:
    """A picture that was found and has a readable header; two are equal that hold the same.

    Attributes:
        row: of the prompt set, for messages.
        name: the column, and the file where there is one.
        sha256: of the file as it is.
        size: width and height in pixels, upright.
    """

    row: str = field(compare=False)
    name: str = field(compare=False)
    sha256: str
    size: tuple[int, int]
    source: Path | bytes = field(repr=False, compare=False)

    @classmethod
    def find(cls, source: Path | bytes, row: str, name: str) -> Picture:
        """Reads the whole file, and decodes its header only.

        Raises:
            UserError: it is not there, no picture, animated, too large, or of 32 bits a channel; naming `name`.
        """
        with _named(name):
            content = _content(source)
            with _opened(content) as image:
                _refuse(image)
                size = image.size[::-1] if _orientation(image) >= 5 else image.size
        return cls(row, name, hashlib.sha256(content).hexdigest(), size, source)

    def load(self) -> Image.Image:
        """RGB with 8 bits a channel, upright: turned as EXIF says, transparency over white, 16 bits of grey scaled.

        Raises:
            UserError: it is cut off or damaged, or is not what was found any more; naming row and picture.
        """
        with about(self.row), _named(self.name):
            content = _content(self.source)
            if hashlib.sha256(content).hexdigest() != self.sha256:
                raise UserError("has changed since the prompts were read")
            with _opened(content) as image:
                turn = _UPRIGHT.get(_orientation(image))
                image.load()
                return _as_rgb(image if turn is None else image.transpose(turn))


def _content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever Pillow raises for a damaged file (it has many ways), as one sentence about the picture."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: no picture that Pillow knows") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: damaged, or cannot be read ({shortened(reason, 100)})") from error


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, which are refused, and of odd EXIF and TIFF tags
        with Image.open(BytesIO(content)) as image:
            yield image


def _refuse(image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise UserError(
            f"{image.width} x {image.height} pixels; the most is {MOST_PIXELS / 1e6:.0f} million, make it smaller"
        )
    # A photo of several exposures (MPO) is a JPEG with a first picture that stands for all.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise UserError(f"an animation or stack of {image.n_frames} pictures; give one of them")  # type: ignore[attr-defined]
    if image.mode in _NO_PICTURE:
        raise UserError(f"32 bits a channel (Pillow's mode {image.mode}); convert it to 8 or 16 bits")


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts them, read from the header alone: `getexif` of a PNG would decode all of it."""
    if image.format == "TIFF":  # turned by Pillow, also in its size
        return 1
    said = Image.Image.getexif(image).get(_ORIENTATION)
    return said if said in _UPRIGHT else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_GREY:
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
