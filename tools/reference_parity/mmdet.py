"""mmdet 3.3.0's Mask2Former, as GenEval runs it. Run inside the environment of requirements/mmdet.txt only.

The test pipeline is that of mmdet 2.x, which published GenEval numbers come from: pixels stay 8 bits until they are
normalised, and the padding is grey. With it this is, bit for bit, what mmdet 2.28.2 answers. On the CPU.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONFIG = "mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"
# Half a minute each on a CPU.
_PICTURES = 2

Arrays = dict[str, np.ndarray]


def random_weights(path: str) -> None:
    """A checkpoint as published, with random weights."""
    import torch

    torch.manual_seed(0)
    model = _model(None)
    # As they are, all classes would be equally likely and the best hundred a matter of rounding.
    model.panoptic_head.cls_embed.weight.data.mul_(8)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, path)


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], Arrays]:
    """For the first two images, to the network's input `pixels_i` [3, H, W], its output `class_logits_i` [Q, 81] and
    `mask_logits_i` [Q, H / 4, W / 4], and after post-processing, the best first, `scores_i` [N], `labels_i` [N],
    `boxes_i` [N, 4] and `areas_i` [N], the masks' numbers of pixels.
    """
    model = _model(weights)

    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Arrays:
        found = [_detect(model, image) for image in images[:_PICTURES]]
        return {f"{name}_{i}": value for i, arrays in enumerate(found) for name, value in arrays.items()}

    return run


def _model(weights: str | None) -> Any:
    stand_in_for_compiled_operators()
    import mmdet  # type: ignore[import-not-found,unused-ignore]
    from mmdet.apis import init_detector  # type: ignore[import-not-found,unused-ignore]

    config = Path(mmdet.__file__).parent / ".mim/configs" / CONFIG
    return init_detector(str(config), weights, device="cpu", cfg_options={"model.backbone.init_cfg": None})


def _detect(model: Any, image: Image.Image) -> Arrays:
    import torch
    from mmcv.transforms import Compose, Pad, Resize  # type: ignore[import-not-found,unused-ignore]
    from mmdet.datasets.transforms import (  # type: ignore[import-not-found,unused-ignore]
        LoadImageFromNDArray,
        PackDetInputs,
    )

    bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
    resized = Compose([LoadImageFromNDArray(), Resize(scale=(1333, 800), keep_ratio=True)])({"img": bgr, "img_id": 0})
    content = resized["img_shape"]
    pack = PackDetInputs(meta_keys=("ori_shape", "img_shape"))
    data = Compose([Pad(size_divisor=32, pad_val={"img": (128, 128, 128)}), pack])(resized)
    # mmdet 2.x cuts the masks to the image without its padding; 3.x's Pad would make it forget that size.
    data["data_samples"].set_metainfo({"img_shape": content})

    outputs: list[Any] = []
    hook = model.panoptic_head.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        batch = model.data_preprocessor({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}, False)
        found = model.predict(batch["inputs"], batch["data_samples"], rescale=True)[0].pred_instances
    hook.remove()
    (classes, masks), best = outputs[0], found.scores.argsort(descending=True)
    tensors = {
        "pixels": batch["inputs"][0],
        "class_logits": classes[-1][0],
        "mask_logits": masks[-1][0],
        "scores": found.scores[best],
        "labels": found.labels[best],
        "boxes": found.bboxes[best],
        "areas": found.masks[best].sum((1, 2)),
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def stand_in_for_compiled_operators() -> None:
    """Let mmcv-lite import what is built on mmcv's extension. Whatever calls an operator of it raises."""
    import mmcv  # type: ignore[import-not-found,unused-ignore]

    class NotCompiled(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def operator(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f"mmcv's operator {name} is not compiled in mmcv-lite")

            return operator

    extension = NotCompiled("mmcv._ext")
    extension.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = mmcv._ext = extension
