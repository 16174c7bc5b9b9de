"""Runs an adapter inside the environment of its reference library. Standard library, numpy and Pillow only.

runner.py NAME import MODULE...             import these, and nothing else
runner.py NAME random OUT                   write random weights to OUT
runner.py NAME score WEIGHTS FOLDER OUT     FOLDER has 000.png, 001.png, ... and prompts.json; OUT is an .npz
runner.py NAME serve WEIGHTS PORT           the reward server's protocol, on 127.0.0.1
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import math
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
# Of one request, as for the project's own server.
BODY_BYTES, IMAGES, PIXELS, SECONDS = 64 * 2**20, 256, 64 * 2**20, 60

Score = Callable[[list[Image.Image], list[str], list[dict[str, Any]]], dict[str, np.ndarray]]


class RefusedError(Exception):
    """A request that cannot be answered."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def module(file: Path, name: str) -> ModuleType:
    """By path: an adapter may have the name of the library that it imports."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SystemExit(f"there is no {file}")
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def adapter(name: str) -> ModuleType:
    """NAME.py beside this file, with a torchvision that imports."""
    module(HERE / "torchvision_shim.py", "torchvision_shim").ensure_torchvision()
    stem = name.replace("-", "_")
    return module(HERE / f"{stem}.py", f"reference_{stem}")


def score_folder(score: Score, folder: Path, out: Path) -> None:
    request = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    images = [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]
    arrays: dict[str, Any] = dict(score(images, request["prompts"], request["metadata"]))
    np.savez(out, **arrays)


def pictures(texts: list[str]) -> list[Image.Image]:
    """From base64 PNG."""
    opened = []
    for number, text in enumerate(texts):
        try:
            opened.append(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]))
        except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise RefusedError(400, f"image {number} is not a base64 PNG") from error
    if sum(image.width * image.height for image in opened) > PIXELS:  # headers only, nothing is unpacked yet
        raise RefusedError(413, f"the images have more than {PIXELS} pixels together")
    try:
        return [image.convert("RGB") for image in opened]
    except Exception as error:  # a damaged PNG raises OSError, SyntaxError, struct.error, zlib.error, ...
        raise RefusedError(400, f"an image is damaged or truncated ({type(error).__name__})") from error


def parsed(body: bytes) -> tuple[list[Image.Image], list[str], list[dict[str, Any]]]:
    try:
        request = json.loads(body)
        texts, prompts, metadata = request["images"], request["prompts"], request.get("metadata")
        metadata = [{} for _ in prompts] if metadata is None else metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(400, "the body is not a request for scores") from error
    for name, items, kind in (("images", texts, str), ("prompts", prompts, str), ("metadata", metadata, dict)):
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise RefusedError(400, f"{name}: expected a list of {kind.__name__}")
    if not len(texts) == len(prompts) == len(metadata):
        raise RefusedError(400, "images, prompts and metadata differ in number")
    if len(texts) > IMAGES:
        raise RefusedError(413, f"{len(texts)} images; at most {IMAGES}")
    return pictures(texts), prompts, metadata


def make_server(name: str, score: Score, info: dict[str, Any], port: int) -> ThreadingHTTPServer:
    """Serves `score` on 127.0.0.1; port 0 takes a free one."""
    turn = threading.Lock()  # a library is not asked to be safe for several threads

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS

        def do_GET(self) -> None:
            answers: dict[str, dict[str, Any]] = {
                "/health": {"status": "ok"},
                "/info": {"name": name, "identity": info},
            }
            if self.path in answers:
                self.answer(200, answers[self.path])
            else:
                self.answer(404, {"error": "there are /health, /info and /score"})

        def do_POST(self) -> None:
            try:
                self.answer(200, {"scores": self.scores()})
            except RefusedError as refusal:
                self.answer(refusal.status, {"error": refusal.reason})
            except Exception as error:  # the library's own: the request fails, the server stays
                self.answer(500, {"error": f"{type(error).__name__}: {error}"})

        def scores(self) -> list[float | None]:
            length = self.headers.get("Content-Length", "")
            if self.path != "/score" or not length.isdecimal():
                raise RefusedError(404 if self.path != "/score" else 411, "POST /score with a Content-Length")
            if int(length) > BODY_BYTES:
                raise RefusedError(413, f"the body has {length} bytes; at most {BODY_BYTES}")
            request = parsed(self.rfile.read(int(length)))
            if not request[0]:
                return []
            with turn:
                scores = score(*request)["score"]
            return [float(value) if math.isfinite(value) else None for value in scores]

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a line per request is no use here."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def identity(name: str, weights: Path) -> dict[str, Any]:
    """What decides the numbers, for /info."""
    found = {"engine": f"reference library {name}", "weights": weights.name}
    if weights.is_file():
        digest = hashlib.sha256()
        with weights.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        found["sha256"] = digest.hexdigest()
    return found


def main(arguments: list[str]) -> None:
    name, task, *rest = arguments
    reference = adapter(name)
    if task == "import":
        for imported in rest:
            importlib.import_module(imported)
    elif task == "random":
        reference.random_weights(rest[0])
    elif task == "score":
        score_folder(reference.load(rest[0]), Path(rest[1]), Path(rest[2]))
    elif task == "serve":
        server = make_server(name, reference.load(rest[0]), identity(name, Path(rest[0])), int(rest[1]))
        print(f"serving {name} at http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
