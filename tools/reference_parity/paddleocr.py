"""PaddleOCR under Flow-GRPO's formula. Imported inside the isolated environment of `requirements/paddleocr.txt` only.

Weights are a folder with `det` and `rec`, models of text lines and of their letters in PaddleOCR 3.x's layout
(`inference.json`, `inference.pdiparams`, `inference.yml`), such as the published PP-OCRv5_mobile_det and
en_PP-OCRv5_mobile_rec.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Arrays = dict[str, np.ndarray]

_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_NAMES = {"det": "PP-OCRv5_mobile_det", "rec": "PP-OCRv5_mobile_rec"}
# What PaddleOCR does before and after each network, as it is told by its own models' inference.yml (JSON is YAML).
_PICTURE: list[dict[str, Any]] = [{"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}]
_STEPS: dict[str, dict[str, Any]] = {
    "det": {
        "PreProcess": {
            "transform_ops": [
                *_PICTURE,
                {"DetResizeForTest": {"resize_long": 960}},
                {
                    "NormalizeImage": {
                        "mean": [0.485, 0.456, 0.406],
                        "std": [0.229, 0.224, 0.225],
                        "scale": "1./255.",
                        "order": "hwc",
                    }
                },
                {"ToCHWImage": None},
                {"KeepKeys": {"keep_keys": ["image", "shape"]}},
            ]
        },
        "PostProcess": {
            "name": "DBPostProcess",
            "thresh": 0.3,
            "box_thresh": 0.6,
            "max_candidates": 1000,
            "unclip_ratio": 1.5,
        },
    },
    "rec": {
        "PreProcess": {
            "transform_ops": [
                *_PICTURE,
                {"RecResizeImg": {"image_shape": [3, 48, 320]}},
                {"KeepKeys": {"keep_keys": ["image"]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": list(_LETTERS)},
    },
}


def random_weights(path: str) -> None:
    """Write a folder with small random models that PaddleOCR loads and runs, the same each time."""
    import paddle  # type: ignore[import-not-found]
    from paddle import nn

    class Lines(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2D(3, 1, 3, padding=1)

        def forward(self, pixels: Any) -> Any:
            return nn.functional.sigmoid(20 * self.convolution(pixels))

    class Letters(nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2D(3, 8, 3, padding=1)
            self.classes = nn.Linear(8, len(_LETTERS) + 2)  # blank and space

        def forward(self, pixels: Any) -> Any:
            columns = self.convolution(pixels).mean(axis=2)
            columns = nn.functional.avg_pool1d(columns, 8, 8).transpose([0, 2, 1])
            return nn.functional.softmax(20 * self.classes(columns), axis=-1)

    paddle.seed(0)
    for name, network, shape in (("det", Lines(), [-1, 3, -1, -1]), ("rec", Letters(), [-1, 3, 48, -1])):
        folder = Path(path) / name
        folder.mkdir(parents=True, exist_ok=True)
        network.eval()
        paddle.jit.save(network, str(folder / "inference"), [paddle.static.InputSpec(shape, "float32", "x")])
        settings = {"Global": {"model_name": _NAMES[name]}, **_STEPS[name]}
        (folder / "inference.yml").write_text(json.dumps(settings))


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], Arrays]:
    """A function of images and prompts to `score` [B] and `text` [B], what was read.

    The score is that of Flow-GRPO's public scorer: 1 where the first quoted part occurs in the text, else 1 - min(edit
    distance, length) / length. NaN without a quoted part, where that scorer stops.
    """
    os.environ["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] = "True"  # it would ask model hubs whether they are there
    import yaml
    from paddleocr import PaddleOCR

    folders = {name: Path(weights) / name for name in ("det", "rec")}
    names = {
        name: yaml.safe_load((folder / "inference.yml").read_text())["Global"]["model_name"]
        for name, folder in folders.items()
    }
    engine = PaddleOCR(
        device="cpu",
        text_detection_model_name=names["det"],
        text_detection_model_dir=str(folders["det"]),
        text_recognition_model_name=names["rec"],
        text_recognition_model_dir=str(folders["rec"]),
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )

    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Arrays:
        texts = [_read(engine, image) for image in images]
        scores = [_score(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        return {"score": np.array(scores), "text": np.array(texts)}

    return run


def _read(engine: Any, image: Image.Image) -> str:
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    lines = [
        text
        for page in engine.predict(bgr)
        for text, confidence in zip(page["rec_texts"], page["rec_scores"], strict=True)
        if confidence > 0
    ]
    return "".join(lines).replace(" ", "").lower()


def _score(text: str, prompt: str) -> float:
    from Levenshtein import distance  # type: ignore[import-not-found]

    quoted = re.search('"([^"]+)', prompt)
    if quoted is None:
        return float("nan")
    target = quoted[1].replace(" ", "").lower()
    return 1.0 if target in text else 1 - min(distance(text, target), len(target)) / len(target)
