"""Whether the image shows the text that the prompt asks for."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError, nearest
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.gaps import CountsGaps, Gaps, Result
from opd_ds.rewards.ocr_engines import Engine, PaddleEngine, RapidOCREngine

# Marks that open a quotation, and those that close it, the likelier one first.
_CLOSING = {'"': ('"', "”"), "“": ("”", '"'), "„": ("“", "”"), "”": ("”",)}
_NO_TARGET = "without a text to look for"


def normalise(text: str) -> str:
    """Lower case, without white space: what is compared, as in Flow-GRPO."""
    return "".join(text.lower().split())


def quotations(prompt: str) -> tuple[list[str], bool]:
    """What a prompt quotes, in its order, and whether it has quote marks that stand alone.

    Quotes are "straight", “curly”, „low“ or ”high”, also behind a backslash, as in JSON. A mark right behind a number,
    or behind one and between blanks, is an inch sign and opens nothing. Neither does a mark that is not closed.
    Apostrophes are no quotes.
    """
    prompt = prompt.replace('\\"', '"')
    found, alone, place = [], False, 0
    while place < len(prompt):
        mark, behind = prompt[place], place + 1
        place = behind
        if mark not in _CLOSING:
            continue
        ends = (prompt.find(closing, behind) for closing in _CLOSING[mark])
        end = next((end for end in ends if end >= 0), -1)
        if end < 0 or (mark in '"”' and _is_inch_sign(prompt[: behind - 1], prompt[behind:])):
            alone = True
            continue
        found.append(prompt[behind:end])
        place = end + 1
    return found, alone


def _is_inch_sign(before: str, after: str) -> bool:
    number = before.rstrip(" ") if after.startswith(" ") else before
    return number != "" and unicodedata.category(number[-1]) in ("Nd", "No")  # digits; ½ and its like


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that should be seen, normalised: `metadata["text"]`, else all that the prompt quotes, in its order.

    Empty where no text is asked for, and where `metadata["text"]` is neither text nor number.
    """
    text = metadata.get("text")
    if text is None:
        return normalise(" ".join(quotations(prompt)[0]))
    return normalise(str(text)) if is_text(text) else ""


def is_text(value: object) -> bool:
    """Whether a value of the metadata can stand in a picture: 2024 can, true and a list cannot."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def text_score(read: str, target: str) -> float:
    """1 - min(edit distance, length of the target) / length of the target; both normalised, the target not empty."""
    from rapidfuzz.distance import Levenshtein

    return 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)


class OCR(CountsGaps):
    """How exactly the text in the image is the text in quotes: 1 is the same, 0 nothing of it. Range [0, 1].

        score = 1 - min(d, n) / n      d = edit distance between text read and text asked for, n = length of the latter

    Both lower-cased and without white space (Flow-GRPO, arXiv 2505.05470). An image without readable text scores 0; a
    prompt that quotes nothing, or an empty text, is NaN. Where Flow-GRPO's public scorer differs:

    - It gives 1 as soon as the target occurs anywhere in what was read. Here text beside the target costs: an image
      that writes the words twice, or among scribbles, is not a perfect one, and a target of one or two letters would
      be found by chance. Our scores are therefore never higher.
    - It looks for the first quoted part only; here all of them count, in the prompt's order.
    - It stops at a prompt without straight quotes, and scores 0 where the engine fails; both are NaN here.

    Args:
        engine: "rapidocr", with the models of its wheel, or "paddleocr", the engine of the published scores.
        workers: images read at the same time, each by an engine of its own with one thread.
        device: for paddleocr; rapidocr runs on the CPU.
        engine_options: for paddleocr's constructor, such as folders of models.
    """

    name = "ocr"
    needs: ClassVar[Needs] = Needs(packages=("rapidocr", "onnxruntime", "rapidfuzz"), extra="ocr")
    _NEEDS: ClassVar[dict[str, Needs]] = {
        "rapidocr": needs,
        "paddleocr": Needs(
            packages=("paddleocr", "paddle", "rapidfuzz"), install="paddlepaddle==3.3.1 paddleocr==3.7.0 rapidfuzz"
        ),
    }

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        """Those of the engine."""
        engine = options.get("engine", "rapidocr")
        if engine not in cls._NEEDS:
            allowed = ", ".join(cls._NEEDS)
            raise UserError(
                f"reward 'ocr': engine = {engine!r}: unknown; allowed: {allowed}.{nearest(str(engine), cls._NEEDS)}"
            )
        workers = options.get("workers", 1)
        if not isinstance(workers, int) or workers < 1:
            raise UserError(f"reward 'ocr': workers = {workers!r}: a whole number from 1 on")
        return cls._NEEDS[engine]

    def __init__(
        self,
        engine: str = "rapidocr",
        workers: int = 1,
        device: str = "cpu",
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        def start() -> Engine:
            return RapidOCREngine() if engine == "rapidocr" else PaddleEngine(device, engine_options or {})

        engines = [start() for _ in range(workers)]
        self._identity = engines[0].identity()
        self._free: SimpleQueue[Engine] = SimpleQueue()
        for one in engines:
            self._free.put(one)
        self._workers = workers
        self._gaps = Gaps(self.name)

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "score": "1 - min(edit distance, length) / length; lower case, no white space"}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32; `metadata[i]["text"]` goes before what the prompt quotes."""
        targets = [
            target_text(prompt, data) for prompt, data in zip(prompts, metadata or [{}] * len(prompts), strict=True)
        ]
        with ThreadPoolExecutor(self._workers) as pool:
            return self._gaps.close(list(pool.map(self._score_one, images, targets)))

    def _score_one(self, image: Image.Image, target: str) -> Result:
        if not target:
            return _NO_TARGET
        engine = self._free.get()
        try:
            return text_score(normalise(engine.read(image.convert("RGB"))), target)
        except Exception as error:  # the engines raise anything; one image must not take the others along
            return f"failed in the engine: {type(error).__name__}"
        finally:
            self._free.put(engine)
