"""HPSv2.1: Human Preference Score, from the published checkpoint, without hpsv2x or open_clip."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError, nearest
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.checkpoints import located, precision, read_state, still_needed
from opd_ds.rewards.clip import DTYPES, CLIPEncoder
from opd_ds.rewards.gaps import CountsGaps, Gaps
from opd_ds.rewards.open_clip import clip_from_open_clip
from opd_ds.rewards.pictures import close_scores, pad_long_side
from opd_ds.rewards.tokens import Tokens
from opd_ds.rewards.weights import Weights, WrongWeightsError
from opd_ds.utils.hashing import file_sha256

# The files are in half precision.
_FILES = {
    "v2.1": Weights("HPSv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "2.0 GB"),
    "v2.0": Weights("HPSv2", "xswu/HPSv2", "HPS_v2_compressed.pt", "2.0 GB"),
}
_TOKENIZER = Weights(
    "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14",
    "tokenizer.json",
    "2.2 MB",
    "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
)
_HEADS = 16  # of both towers of ViT-H-14
# What ftfy takes for curly quotes.
_STRAIGHT = {0x02BC: "'", **dict.fromkeys(range(0x2018, 0x201C), "'"), **dict.fromkeys(range(0x201C, 0x2020), '"')}


class HPSv2(CountsGaps):
    """Human preference for an image given its prompt, learnt by CLIP ViT-H/14 from HPDv2 (arXiv 2306.09341).

    The published score, a cosine: range [-1, 1], typically 0.2 to 0.35. Papers print it like this or times 100.

    Args:
        device: where the network runs.
        batch_size: images per forward.
        dtype: float32, bfloat16 or float16, of the network. hpsv2x itself runs under float16 autocast on CUDA.
        version: v2.1, or v2.0.
        weights: a file in the layout of the published one instead of it.
        tokenizer: a tokenizer.json of CLIP instead of the published one.

    Raises:
        WeightsMissingError, WrongWeightsError: no such file; not such a checkpoint.
    """

    name = "hpsv2"
    needs: ClassVar[Needs] = Needs(weights=(_FILES["v2.1"], _TOKENIZER))

    def __init__(
        self,
        device: str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        version: str = "v2.1",
        weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        kind = precision(self.name, dtype, *DTYPES)
        self._file = located(_published(version), weights)
        state = read_state(self._file).get("state_dict")
        if not isinstance(state, Mapping):
            raise WrongWeightsError(f"{self._file} is no checkpoint of HPSv2: there is no `state_dict` in it")
        model = clip_from_open_clip(state, _HEADS, str(self._file))
        length = model.config.text_config.max_position_embeddings
        tokens = Tokens.from_file(located(_TOKENIZER, tokenizer), length)
        self.clip = CLIPEncoder(model, tokens, pad_long_side, device=device, dtype=kind, batch_size=batch_size)
        self._version, self._dtype, self._gaps = version, dtype, Gaps(self.name)

    @classmethod
    def needs_for(cls, options: Mapping[str, Any]) -> Needs:
        precision(cls.name, options.get("dtype", DTYPES[0]), *DTYPES)
        needs = Needs(weights=(_published(options.get("version", "v2.1")), _TOKENIZER))
        return still_needed(needs, options, "weights", "tokenizer")

    def identity(self) -> dict[str, Any]:
        return {
            "engine": f"transformers CLIPModel, HPS {self._version}",
            "dtype": self._dtype,
            "sha256": file_sha256(self._file),
            "preprocessing": "long side bicubic with antialiasing (torch), black margins",
        }

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        return close_scores(self._gaps, self.clip.cosine(images, [clean(prompt) for prompt in prompts]))


def clean(prompt: str) -> str:
    """What hpsv2x's tokenizer does to a prompt beforehand, as far as prompts need it.

    HTML entities are resolved (twice) and curly quotes straightened. The rarer repairs of ftfy, which it uses (wrongly
    decoded text, ligatures, full-width letters), are left out.
    """
    return html.unescape(html.unescape(prompt)).translate(_STRAIGHT).strip()


def _published(version: str) -> Weights:
    if version not in _FILES:
        raise UserError(
            f"reward 'hpsv2': version = {version!r}; allowed: {', '.join(_FILES)}.{nearest(version, _FILES)}"
        )
    return _FILES[version]
