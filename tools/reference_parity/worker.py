"""Runs an adapter inside the environment of its reference library. Standard library, numpy and Pillow only.

worker.py NAME import MODULE...     import these, and nothing else
worker.py NAME random OUT           write random weights to OUT
worker.py NAME score WEIGHTS        answer requests until the input ends, see `answer`
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent

Score = Callable[[list[Image.Image], list[str], list[dict[str, Any]]], dict[str, np.ndarray]]


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


def answer(score: Score, line: bytes) -> dict[str, str]:
    """To the body of a reward server's POST /score: the arrays as a base64 .npz, or why there are none."""
    request = json.loads(line)
    images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in request["images"]]
    try:
        arrays: dict[str, Any] = dict(score(images, request["prompts"], request["metadata"] or [{} for _ in images]))
    except Exception as error:  # the library's own: the request fails, the worker stays
        return {"error": f"{type(error).__name__}: {error}"}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return {"arrays": base64.b64encode(stream.getvalue()).decode()}


def main(arguments: list[str]) -> None:
    # Libraries print: what they say goes to standard error, answers alone to standard output.
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        name, task, *rest = arguments
        reference = adapter(name)
        if task == "import":
            for imported in rest:
                importlib.import_module(imported)
        elif task == "random":
            reference.random_weights(rest[0])
        elif task == "score":
            score = reference.load(rest[0])
            print("{}", file=output, flush=True)  # ready
            for line in sys.stdin.buffer:
                print(json.dumps(answer(score, line)), file=output, flush=True)
        else:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
