"""Engines that read text from an image, behind one small interface."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.utils.hashing import file_sha256


class Engine(Protocol):
    """One reader; not shared between threads."""

    def read(self, image: Image.Image) -> str:
        """All text of an RGB image, its lines from top to bottom; empty where there is none."""
        ...

    def identity(self) -> dict[str, Any]: ...


class RapidOCREngine:
    """PP-OCRv6 small through onnxruntime, one thread, with the models of rapidocr's own wheel: nothing is downloaded.

    Lines are looked for in the image scaled to at most 512 pixels and read from it at full size. Text that stands
    upside down is not turned (no direction classifier).
    """

    _MODELS = ("PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx")
    _SETTINGS: ClassVar[dict[str, Any]] = {
        "Global.use_cls": False,
        "Det.limit_side_len": 512,
        "Det.limit_type": "max",
    }

    def __init__(self) -> None:
        import rapidocr

        folder = Path(rapidocr.__file__).parent / "models"
        self._files = [folder / name for name in self._MODELS]
        for file in self._files:
            if not file.is_file():
                raise UserError(
                    f"reward 'ocr': rapidocr {version('rapidocr')} does not carry {file.name}; "
                    "pip install --force-reinstall 'rapidocr>=3.10,<4'"
                )
        detector, recogniser = map(str, self._files)
        files = {"Det.model_path": detector, "Rec.model_path": recogniser}
        # One thread per engine: several engines then share the cores best. "critical": an empty image is no warning.
        quiet = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
        self._engine = rapidocr.RapidOCR(params={**self._SETTINGS, **files, **quiet})

    def read(self, image: Image.Image) -> str:
        return " ".join(self._engine(image).txts or ())

    def identity(self) -> dict[str, Any]:
        return {
            "engine": f"rapidocr {version('rapidocr')}, onnxruntime {version('onnxruntime')}",
            "models": {file.name: file_sha256(file) for file in self._files},
            "settings": self._SETTINGS,
        }


class PaddleEngine:
    """PaddleOCR, the engine of the published OCR scores, through its 2.x (`ocr`) or 3.x (`predict`) interface.

    It fetches its default models at first use unless `options` names folders: for 2.x `det_model_dir`, `rec_model_dir`
    and `cls_model_dir`; for 3.x `text_detection_model_dir` and `text_recognition_model_dir`, with `..._model_name`.
    """

    def __init__(self, device: str, options: Mapping[str, Any]) -> None:
        from paddleocr import PaddleOCR, __version__

        self._version = __version__
        self._options = dict(options)
        on_gpu = device.startswith("cuda")
        self._is_3 = hasattr(PaddleOCR, "predict")
        if self._is_3:
            steps = ("use_doc_orientation_classify", "use_doc_unwarping", "use_textline_orientation")
            defaults: dict[str, Any] = {"device": "gpu" if on_gpu else "cpu", **dict.fromkeys(steps, False)}
        else:
            defaults = {"use_gpu": on_gpu, "use_angle_cls": False, "show_log": False}
        self._engine = PaddleOCR(**{"lang": "en", **defaults, **self._options})

    def read(self, image: Image.Image) -> str:
        array = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # both interfaces take BGR
        return " ".join(text for text, confidence in self._lines(array) if confidence > 0)

    def _lines(self, array: np.ndarray) -> list[tuple[str, float]]:
        if self._is_3:
            pages = self._engine.predict(array)
            return [line for page in pages for line in zip(page["rec_texts"], page["rec_scores"], strict=True)]
        pages = self._engine.ocr(array, cls=False)
        return [line for page in pages or [] for _, line in page or []]

    def identity(self) -> dict[str, Any]:
        return {"engine": f"paddleocr {self._version}", "options": self._options}
