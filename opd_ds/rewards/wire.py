"""What goes over HTTP between `RemoteReward` and the server: JSON, images as base64 PNG. No pickle, ever."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd_ds.rewards.base import Metadata


@dataclass(frozen=True)
class Limits:
    """What one request may hold; with the server's two requests at a time this bounds its memory.

    Attributes:
        body_bytes: of the JSON text.
        images: images.
        pixels: of all images together, checked before an image is unpacked (64 of 1024 x 1024).
        seconds: for the body to arrive.
        pause: seconds in which further 64 KiB of a body must arrive while other requests wait for its end.
    """

    body_bytes: int = 64 * 2**20
    images: int = 256
    pixels: int = 64 * 2**20
    seconds: float = 60.0
    pause: float = 5.0


class RefusedError(Exception):
    """A request that cannot be answered: the HTTP status and a reason in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, one_line(reason)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ScoreRequest(_Strict):
    images: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]] | None = None


class ScoreResponse(_Strict):
    """One number per image; null where the reward had none."""

    scores: list[Annotated[float, Field(allow_inf_nan=False)] | None]


class Info(_Strict):
    name: str
    identity: dict[str, Any]


def one_line(text: object, length: int = 300) -> str:
    return " ".join(str(text).split())[:length]


def encode_request(images: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None) -> bytes:
    """The body of POST /score.

    Raises:
        ValueError, OSError: an image cannot be encoded or metadata is not plain data.
    """
    request = ScoreRequest(
        images=[_to_text(image) for image in images],
        prompts=list(prompts),
        metadata=None if metadata is None else list(metadata),
    )
    return request.model_dump_json().encode()


def _to_text(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)  # the network is local, time counts
    return base64.b64encode(buffer.getvalue()).decode()


def decode_request(
    body: bytes | bytearray, limits: Limits
) -> tuple[list[Image.Image], list[str], list[dict[str, Any]] | None]:
    """Images (RGB), prompts and metadata of a body.

    Raises:
        RefusedError: 400 malformed, 413 over a limit.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(400, f"the body is not a request for scores: {_first_problem(error)}") from error
    count = len(request.images)
    if count > limits.images:
        raise RefusedError(413, f"{count} images; at most {limits.images}")
    if len(request.prompts) != count or (request.metadata is not None and len(request.metadata) != count):
        raise RefusedError(400, "images, prompts and metadata differ in number")
    return _pictures(request.images, limits.pixels), request.prompts, request.metadata


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
    """The scores in a reply to `count` images.

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
