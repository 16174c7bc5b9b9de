"""image-reward 1.5. Run inside the environment of requirements/image-reward.txt only."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The published med_config.json: BERT base with cross-attention.
_MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
_VOCABULARY = 30522  # of bert-base-uncased


def random_weights(path: str) -> None:
    """A checkpoint as published, and beside it med_config.json and a made-up vocab.txt of BERT's size."""
    import torch
    from ImageReward import ImageReward  # type: ignore[import-not-found,unused-ignore]

    folder = Path(path).parent
    (folder / "med_config.json").write_text(json.dumps(_MED_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(_made_up_vocabulary()), encoding="utf-8")
    _own_vocabulary(folder)
    torch.manual_seed(0)
    model = ImageReward(med_config=str(folder / "med_config.json"))
    for name, tensor in model.mlp.named_parameters():
        if name.endswith("weight"):  # as they are made, every image would get the same score
            torch.nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)
    torch.save(model.state_dict(), path)


def load(weights: str) -> Callable[[list[Image.Image], list[str], list[dict[str, Any]]], dict[str, np.ndarray]]:
    """To `score` [B], `pixels` [B, 3, 224, 224] and `tokens` [B, 35].

    med_config.json and vocab.txt are taken from beside the weights where they are; the library fetches them otherwise.
    """
    import ImageReward  # type: ignore[import-not-found,unused-ignore]
    import torch

    folder = Path(weights).parent
    _own_vocabulary(folder)
    config = folder / "med_config.json"
    model = ImageReward.load(weights, med_config=str(config) if config.is_file() else None)

    @torch.no_grad()
    def run(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        tokens = model.blip.tokenizer(prompts, padding="max_length", truncation=True, max_length=35)
        return {
            "score": np.array([model.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]),
            "pixels": torch.stack([model.preprocess(image) for image in images]).numpy(),
            "tokens": np.array(tokens.input_ids),
        }

    return run


def _own_vocabulary(folder: Path) -> None:
    """Have the library read `folder`/vocab.txt, where there is one, as bert-base-uncased."""
    if not (folder / "vocab.txt").is_file():
        return
    from ImageReward.models.BLIP import blip  # type: ignore[import-not-found,unused-ignore]
    from transformers import BertTokenizer

    class Local(BertTokenizer):  # type: ignore[misc,unused-ignore]
        @classmethod
        def from_pretrained(cls, name: str) -> BertTokenizer:
            return BertTokenizer(str(folder / "vocab.txt"))

    blip.BertTokenizer = Local


def _made_up_vocabulary() -> list[str]:
    letters = string.ascii_lowercase
    characters = list(string.digits + string.punctuation + letters)
    pieces = ["".join(three) for three in itertools.product(letters, repeat=3)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *pieces]
    return [*words, *(f"##{piece}" for piece in pieces)][:_VOCABULARY]
