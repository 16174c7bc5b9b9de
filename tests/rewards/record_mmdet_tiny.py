"""Writes mmdet_tiny.npz: what mmdet answers to the tiny checkpoint of mmdet_layout.py.

Run it, from this folder, in the environment of tools/reference_parity/requirements/mmdet.txt:
    python record_mmdet_tiny.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mmdet_layout as layout
import numpy as np
import torch

HERE = Path(__file__).parent
# The image that test_geneval_detector.py calls RECORDED: height, width.
INPUT, CONTENT, ORIGINAL = (64, 96), (40, 60), (53, 80)


sys.path.append(str(HERE.parents[1] / "tools/reference_parity"))
from runner import adapter  # noqa: E402


def tiny_model() -> Any:
    reference = adapter("mmdet")
    reference.stand_in_for_compiled_operators()
    import mmdet
    from mmdet.apis import init_detector
    from mmengine.config import Config

    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / reference.CONFIG)
    config.model.backbone.update(
        init_cfg=None,
        embed_dims=layout.EMBED,
        depths=layout.DEPTHS,
        num_heads=layout.HEADS,
        window_size=layout.WINDOW,
    )
    head = config.model.panoptic_head
    head.update(
        in_channels=[layout.EMBED * 2**stage for stage in range(4)],
        feat_channels=layout.HIDDEN,
        out_channels=layout.HIDDEN,
        num_queries=layout.QUERIES,
    )
    for part, inner, attentions in (
        (head.pixel_decoder.encoder, layout.PIXEL_FFN, ("self_attn_cfg",)),
        (head.transformer_decoder, layout.DECODER_FFN, ("self_attn_cfg", "cross_attn_cfg")),
    ):
        part.num_layers = layout.LAYERS
        part.layer_cfg.ffn_cfg.update(embed_dims=layout.HIDDEN, feedforward_channels=inner)
        for attention in attentions:
            part.layer_cfg[attention].embed_dims = layout.HIDDEN
    for encoding in (head.positional_encoding, head.pixel_decoder.positional_encoding):
        encoding.num_feats = layout.HIDDEN // 2
    return init_detector(config, None, device="cpu")


@torch.no_grad()
def main() -> None:
    from mmdet.structures import DetDataSample

    model = tiny_model()
    constants = {key: value for key, value in model.state_dict().items() if key.endswith("relative_position_index")}
    model.load_state_dict({**layout.state(), **constants}, strict=True)
    outputs: list[Any] = []
    model.panoptic_head.register_forward_hook(lambda module, args, output: outputs.append(output))
    sample = DetDataSample(metainfo={"img_shape": CONTENT, "ori_shape": ORIGINAL, "batch_input_shape": INPUT})
    found = model.predict(layout.pixels(), [sample], rescale=True)[0].pred_instances
    (classes, masks), order = outputs[0], found.scores.argsort(descending=True)
    np.savez_compressed(
        HERE / "mmdet_tiny.npz",
        class_logits=classes[-1][0],
        mask_logits=masks[-1][0],
        scores=found.scores[order],
        labels=found.labels[order],
        boxes=found.bboxes[order],
        areas=found.masks[order].sum((1, 2)),
    )


if __name__ == "__main__":
    main()
