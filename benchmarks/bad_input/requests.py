"""What a reward server and its client read of each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.bad_input.mutations import damaged, spoiled
from benchmarks.bad_input.trial import Kind, RefusedError
from opd_ds.rewards import wire

_IMAGE = Image.new("RGB", (8, 8))
_REQUEST = wire.encode_request([_IMAGE] * 2, ["a", "b"], [{"text": "x"}, {"level": 1}], [(_IMAGE,), ()])
_REPLY = {"scores": [0.5, None]}
_LIMITS = wire.Limits(body_bytes=2**20, images=4, pixels=2**12)


def _as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _write(_: bytes, folder: Path) -> None:
    pass


def _request(body: bytes, folder: Path) -> None:
    try:
        asked = wire.decode_request(body, _LIMITS)
    except wire.RefusedError as error:
        raise RefusedError(error.reason) from error
    known = [asked.prompts, *(part for part in (asked.metadata, asked.references) if part is not None)]
    if any(len(part) != len(asked.drawn) for part in known):
        raise AssertionError("parts of a request differ in number")


def _reply(body: bytes, folder: Path) -> None:
    try:
        wire.decode_scores(body, 2)
    except ValueError as error:  # the client counts it as garbage and shows no reason
        raise RefusedError from error


KINDS = (
    Kind("reward request", damaged(_REQUEST) | spoiled(json.loads(_REQUEST)).map(_as_bytes), _write, _request),
    Kind("reward reply", damaged(_as_bytes(_REPLY)) | spoiled(_REPLY).map(_as_bytes), _write, _reply),
)
