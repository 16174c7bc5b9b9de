"""ClipScore: does the image match its prompt, as CLIP sees it?"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.clip import FolderCLIPReward
from opd_ds.rewards.pictures import close_scores
from opd_ds.rewards.weights import Weights

CLIP_VIT_L_14 = Weights("clip-vit-large-patch14", "openai/clip-vit-large-patch14", None, "1.7 GB")


class ClipScore(FolderCLIPReward):
    """Cosine between image and prompt in OpenAI's CLIP ViT-L/14. Range [-1, 1], typically 0.2 to 0.35.

    The plain cosine, which evaluation tables print. CLIPScore as first published (arXiv 2104.08718) is
    2.5 max(cosine, 0) on ViT-B/32; DiffusionNFT divides the logit by 100, which is the cosine again, Flow-GRPO by 30.
    """

    name = "clipscore"
    needs = Needs(weights=(CLIP_VIT_L_14,))

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        return close_scores(self._gaps, self._clip.cosine(images, prompts))
