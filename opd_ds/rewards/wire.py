"""What goes over HTTP between `RemoteReward` and the server: JSON, images as base64 PNG, clips as lists of them. No
pickle, ever.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd_ds.rewards.base import Metadata
from opd_ds.rewards.clips import Clip, Drawn
from opd_ds.rewards.references import References


@dataclass(frozen=True)
class Limits:
    """What one request may hold; with the server's two requests at a time this bounds its memory.

    Attributes:
        body_bytes: of the JSON text.
        images: images, of clips all frames.
        pixels: of all images together, checked before an image is unpacked (64 of 1024 x 1024).
        seconds: for the body to arrive.
        pause: seconds in which further 64 KiB of a body must arrive while other requests wait for its end.
    """

    body_bytes: int = 64 * 2**20
    images: int = 256
    pixels: int = 64 * 2**20
    seconds: float = 60.0
    pause: float = 5.0


# A clip of 81 frames of 480 x 832 is some 60 MB of PNG; an edited image may have ten references of a million pixels.
CLIP_LIMITS = Limits(body_bytes=256 * 2**20, images=1024, pixels=256 * 2**20, seconds=240.0)


class RefusedError(Exception):
    """A request that cannot be answered: the HTTP status and a reason in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, one_line(reason)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ClipText(_Strict):
    frames: list[str] = Field(min_length=1)
    fps: float = Field(gt=0, allow_inf_nan=False)


class ScoreRequest(_Strict):
    """Images, or clips for a reward that takes them. `references` has for each of them the places of its reference
    pictures in `pictures`, which holds each once. It is sent where a reward takes them only, see `Info`.
    """

    images: list[str] | None = None
    clips: list[ClipText] | None = None
    prompts: list[str]
    metadata: list[dict[str, Any]] | None = None
    pictures: list[str] = []
    references: list[list[Annotated[int, Field(ge=0)]]] | None = None


class ScoreResponse(_Strict):
    """One number per image or clip; null where the reward had none."""

    scores: list[Annotated[float, Field(allow_inf_nan=False)] | None]


class Info(_Strict):
    """What is served. What it takes is sent where it is true only: clients from before do not know it."""

    name: str
    identity: dict[str, Any]
    takes_clips: bool = False
    takes_references: bool = False


@dataclass(frozen=True)
class Asked:
    """What a request asks about: images (RGB) or clips, and what belongs to each."""

    drawn: list[Drawn]
    prompts: list[str]
    metadata: list[dict[str, Any]] | None
    references: References | None


def one_line(text: object, length: int = 300) -> str:
    return " ".join(str(text).split())[:length]


def encode_request(
    drawn: Sequence[Drawn], prompts: Sequence[str], metadata: Metadata | None, references: References | None = None
) -> bytes:
    """The body of POST /score, for images or for clips.

    Raises:
        ValueError, OSError: an image cannot be encoded or metadata is not plain data.
    """
    clips = [
        ClipText(frames=[_to_text(frame) for frame in one.frames], fps=one.fps)
        for one in drawn if isinstance(one, Clip)
    ]  # fmt: skip
    images = [_to_text(one) for one in drawn if not isinstance(one, Clip)]
    shown: dict[str, Any] = {"clips": clips} if clips else {"images": images}
    if references is not None:
        places: dict[int, int] = {}  # the images of a group share their pictures, the same objects
        beside = [[places.setdefault(id(one), len(places)) for one in own] for own in references]
        known = {id(one): one for own in references for one in own}
        shown |= {"pictures": [_to_text(known[name]) for name in places], "references": beside}
    asked = None if metadata is None else list(metadata)
    request = ScoreRequest(**shown, prompts=list(prompts), metadata=asked)
    return request.model_dump_json(exclude_unset=True).encode()  # servers from before clips do not know them


def _to_text(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)  # the network is local, time counts
    return base64.b64encode(buffer.getvalue()).decode()


def decode_request(body: bytes | bytearray, limits: Limits, *, clips: bool = False) -> Asked:
    """What stands in a body.

    Args:
        clips: which of the two the reward takes.

    Raises:
        RefusedError: 400 malformed, 413 over a limit.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(400, f"the body is not a request for scores: {_first_problem(error)}") from error
    kind = "clips" if clips else "images"
    wanted = request.clips if clips else request.images
    if wanted is None or None not in (request.clips, request.images):
        raise RefusedError(400, f"this reward scores {kind}: the body has to have {kind}, and nothing in their place")
    texts = [text for one in wanted for text in (one.frames if isinstance(one, ClipText) else [one])]
    texts += request.pictures
    if len(texts) > limits.images:
        raise RefusedError(413, f"{len(texts)} images; at most {limits.images}")
    count, references = len(wanted), request.references
    if any(known is not None and len(known) != count for known in (request.prompts, request.metadata, references)):
        raise RefusedError(400, f"{kind}, prompts, metadata and references differ in number")
    if any(place >= len(request.pictures) for own in references or () for place in own):
        raise RefusedError(400, f"references: there are {len(request.pictures)} pictures")
    images = iter(_pictures(texts, limits.pixels))
    drawn: list[Drawn] = [
        Clip(tuple(islice(images, len(one.frames))), one.fps) if isinstance(one, ClipText) else next(images)
        for one in wanted
    ]
    pictures = list(images)
    beside = None if references is None else [tuple(pictures[place] for place in own) for own in references]
    return Asked(drawn, request.prompts, request.metadata, beside)


def _pictures(texts: list[str], pixels: int) -> list[Image.Image]:
    opened = []
    for number, text in enumerate(texts):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
            raise RefusedError(400, f"image {number} is not a base64 PNG ({type(error).__name__})") from error
        opened.append(image)
    total = sum(image.width * image.height for image in opened)
    if total > pixels:  # opening read the headers only; nothing is unpacked yet
        raise RefusedError(413, f"the images have {total} pixels together; at most {pixels}")
    return [_unpacked(image, number) for number, image in enumerate(opened)]


def _unpacked(image: Image.Image, number: int) -> Image.Image:
    try:
        return image.convert("RGB")
    except Exception as error:  # a damaged PNG raises OSError, SyntaxError, struct.error, zlib.error, ...
        raise RefusedError(400, f"image {number} is damaged or truncated ({type(error).__name__})") from error


def decode_scores(body: bytes, count: int) -> list[float | None]:
    """The scores in a reply to `count` images or clips.

    Raises:
        ValueError: not that.
    """
    scores = ScoreResponse.model_validate_json(body).scores
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} images")
    return scores


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]
