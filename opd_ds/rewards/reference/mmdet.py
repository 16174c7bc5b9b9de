"""mmdet's Mask2Former as GenEval runs it. Imported inside the isolated environment of `requirements/mmdet.txt` only.

The network is mmdet 3.3.0's, on the CPU. Its test pipeline is that of mmdet 2.x, which the published GenEval numbers
come from: pixels stay 8 bits until they are normalised, and the padding is grey.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CONFIG = "mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"
_KEEP: list[Any] = []

Arrays = dict[str, np.ndarray]


def random_weights(path: str) -> None:
    """Write a checkpoint of the published layout and size with random weights, the same each time."""
    torch.manual_seed(0)
    model = _model(None)
    # As they are, all classes would be equally likely and the best hundred a matter of rounding.
    model.panoptic_head.cls_embed.weight.data.mul_(8)
    torch.save({"meta": {"dataset_meta": {}}, "state_dict": model.state_dict()}, path)


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], Arrays]:
    """A function of pictures (prompts and metadata are not read) to, with i counting the pictures:

    `pixels_i` [3, H, W], the network's input; `class_logits_i` [Q, 81] and `mask_logits_i` [Q, h, w], its output;
    `boxes_i` [N, 4], `scores_i` [N] and `labels_i` [N] in descending order of score, and `masks_i` [N, H, W], after
    post-processing.
    """
    model = _model(weights)

    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Arrays:
        return {f"{key}_{i}": value for i, image in enumerate(images) for key, value in _detect(model, image).items()}

    return run


def _model(weights: str | None) -> Any:
    stand_in_for_compiled_ops()
    import mmdet  # type: ignore[import-not-found]
    from mmdet.apis import init_detector  # type: ignore[import-not-found]

    config = Path(mmdet.__file__).parent / ".mim/configs" / CONFIG
    return init_detector(str(config), weights, device="cpu", cfg_options={"model.backbone.init_cfg": None})


@torch.no_grad()
def _detect(model: Any, image: Image.Image) -> Arrays:
    from mmcv.transforms import Compose, Pad, Resize  # type: ignore[import-not-found]
    from mmdet.datasets.transforms import LoadImageFromNDArray, PackDetInputs  # type: ignore[import-not-found]

    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    resized = Compose([LoadImageFromNDArray(), Resize(scale=(1333, 800), keep_ratio=True)])({"img": bgr, "img_id": 0})
    content = resized["img_shape"]
    pack = PackDetInputs(meta_keys=("ori_shape", "img_shape"))
    data = Compose([Pad(size_divisor=32, pad_val={"img": (128, 128, 128)}), pack])(resized)
    # mmdet 2.x cuts the masks to the picture without its padding; 3.x's Pad would make it forget that size.
    data["data_samples"].set_metainfo({"img_shape": content})

    batch = model.data_preprocessor({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}, False)
    outputs: list[Any] = []
    hook = model.panoptic_head.register_forward_hook(lambda module, args, output: outputs.append(output))
    found = model.predict(batch["inputs"], batch["data_samples"], rescale=True)[0].pred_instances
    hook.remove()
    (classes, masks), order = outputs[0], found.scores.argsort(descending=True)
    tensors = {
        "pixels": batch["inputs"][0],
        "class_logits": classes[-1][0],
        "mask_logits": masks[-1][0],
        "boxes": found.bboxes[order],
        "scores": found.scores[order],
        "labels": found.labels[order],
        "masks": found.masks[order],
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def stand_in_for_compiled_ops() -> None:
    """Let mmdet import next to a CPU torch: torchvision's wheel is linked against CUDA, mmcv-lite has no ops.

    Mask2Former on the CPU calls none of them; whatever would, raises.
    """
    if _KEEP:
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEEP.append(library)

    import mmcv  # type: ignore[import-not-found]

    class NotCompiled(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def op(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f"mmcv op {name} is not compiled here")

            return op

    extension = NotCompiled("mmcv._ext")
    extension.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = mmcv._ext = extension
