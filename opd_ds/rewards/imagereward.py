"""ImageReward on transformers' BLIP, from the published checkpoint, without image-reward."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from opd_ds.rewards.base import Metadata, Needs, batches
from opd_ds.rewards.checkpoints import (
    State,
    from_transformers,
    layers,
    linear_head,
    located,
    precision,
    read_state,
    refuse,
    shape,
    still_needed,
)
from opd_ds.rewards.gaps import CountsGaps, Gaps
from opd_ds.rewards.pictures import centre_crop_torchvision, close_scores, stacked
from opd_ds.rewards.tokens import Tokens
from opd_ds.rewards.weights import Weights
from opd_ds.utils.hashing import file_sha256

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

_FILE = Weights("ImageReward", "THUDM/ImageReward", "ImageReward.pt", "1.8 GB")
_VOCABULARY = Weights(
    "bert-base-uncased",
    "google-bert/bert-base-uncased",
    "vocab.txt",
    "232 kB",
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
# Mean and standard deviation of the raw output on the authors' data (ImageReward.py in image-reward 1.5).
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35
_VISION_HEADS, _TEXT_HEADS = 16, 12  # of BLIP large and of BERT base; shapes do not tell them

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# Heads of BLIP's pre-training, in the file but not in the score, and a constant.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


_DTYPES = ("float32", "bfloat16")


class ImageReward(CountsGaps):
    """Human preference for an image given its prompt, learnt by BLIP from ranked images (arXiv 2304.05977).

    The published score, standardised on the authors' data: about -2.5 to 2, higher is better, nothing bounds it.

    Args:
        device: where the network runs.
        batch_size: images per forward.
        dtype: float32 or bfloat16, of BLIP; the head is float32. The model was trained and published in float32,
            float16 has never been shown to hold its activations.
        weights: a file in the layout of the published one instead of it.
        vocabulary: a vocab.txt of uncased BERT instead of the published one.

    Raises:
        WeightsMissingError, WrongWeightsError: no such file; not such a checkpoint.
    """

    name = "imagereward"
    needs: ClassVar[Needs] = Needs(weights=(_FILE, _VOCABULARY))

    def __init__(
        self,
        device: str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        weights: str | Path | None = None,
        vocabulary: str | Path | None = None,
    ) -> None:
        kind = precision(self.name, dtype, *_DTYPES)
        self._file = located(_FILE, weights)
        vision, text, self._head = _networks(read_state(self._file), str(self._file))
        self._size = vision.config.image_size
        self._vision, self._text = (part.to(device=device, dtype=kind).requires_grad_(False) for part in (vision, text))
        self._tokens = Tokens.from_bert_vocabulary(located(_VOCABULARY, vocabulary), _TOKENS)
        self._device, self._kind, self._batch_size = device, kind, batch_size
        self._dtype, self._gaps = dtype, Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        precision(cls.name, options.get("dtype", _DTYPES[0]), *_DTYPES)
        return still_needed(cls.needs, options, "weights", "vocabulary")

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "transformers BLIP",
            "dtype": self._dtype,
            "sha256": file_sha256(self._file),
            "preprocessing": "short side bicubic (Pillow), centre crop",
        }

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """The network's input, [B, 3, H, W] float32."""
        return stacked(images, centre_crop_torchvision, self._size)

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, [B, 35] each."""
        return self._tokens(prompts)

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        pairs = list(zip(images, prompts, strict=True))
        scores = [self._scores([i for i, _ in part], [p for _, p in part]) for part in batches(pairs, self._batch_size)]
        return close_scores(self._gaps, torch.cat([torch.empty(0), *scores]))

    @torch.no_grad()
    def _scores(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        seen = self._vision(pixel_values=self.pixels(images).to(self._device, self._kind)).last_hidden_state
        ids, mask = (part.to(self._device) for part in self.tokens(prompts))
        read = self._text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device),
            is_decoder=False,
        ).last_hidden_state
        return (self._head(read[:, 0].float().cpu())[:, 0] - _MEAN) / _STD


def _networks(state: State, origin: str) -> tuple[Any, Any, torch.nn.Sequential]:
    """Vision and text tower (transformers, float32) and the head on the first token."""
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    parts: dict[str, dict[str, Tensor]] = {_VISION: {}, _TEXT: {}, _HEAD: {}}
    unexpected = []
    for key, value in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if key.startswith(_UNUSED):
            continue
        if prefix is None:
            unexpected.append(key)
        else:
            parts[prefix][key.removeprefix(prefix)] = value
    refuse(f"{origin} is no ImageReward", unexpected=unexpected)
    vision_config, text_config = _configs(state, origin)
    vision = {_vision_name(key): value for key, value in parts[_VISION].items()}
    return (
        from_transformers(BlipVisionModel, None, origin, config=vision_config, state_dict=vision),
        from_transformers(
            BlipTextModel, None, origin, config=text_config, state_dict=parts[_TEXT], add_pooling_layer=False
        ),
        linear_head(parts[_HEAD], text_config.hidden_size, f"{origin}, {_HEAD}"),
    )


def _vision_name(key: str) -> str:
    if key.startswith("norm."):
        return f"post_layernorm.{key.removeprefix('norm.')}"
    for theirs, ours in _VISION_NAMES.items():
        key = key.replace(theirs, ours)
    return key


def _configs(state: State, origin: str) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Sizes from shapes; the rest is that of BLIP large and of image-reward's med_config.json."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def size(key: str, dimensions: int = 2) -> tuple[int, ...]:
        return shape(state, key, dimensions, origin)

    width, _, patch, _ = size(f"{_VISION}patch_embed.proj.weight", 4)
    vocabulary, text_width = size(f"{_TEXT}embeddings.word_embeddings.weight")
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=size(f"{_VISION}blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=layers(state, f"{_VISION}blocks."),
        num_attention_heads=_VISION_HEADS,
        patch_size=patch,
        image_size=patch * isqrt(size(f"{_VISION}pos_embed", 3)[1] - 1),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=size(f"{_TEXT}encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=layers(state, f"{_TEXT}encoder.layer."),
        num_attention_heads=_TEXT_HEADS,
        max_position_embeddings=size(f"{_TEXT}embeddings.position_embeddings.weight")[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # which gives it its cross-attention; run as an encoder
    )
    return vision, text
