"""PickScore: which image would people pick for this prompt?"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.clip import FolderCLIPReward
from opd_ds.rewards.pictures import close_scores
from opd_ds.rewards.weights import Weights


class PickScore(FolderCLIPReward):
    """Human preference between images for a prompt, learnt by CLIP ViT-H/14 from Pick-a-Pic (arXiv 2305.01569).

    The published logit, exp(logit_scale) times the cosine: about 16 to 26, typically 20 to 23. Code of the Flow-GRPO
    and DiffusionNFT line divides it by 26 to train on it; here it is not divided.
    """

    name = "pickscore"
    needs = Needs(weights=(Weights("PickScore_v1", "yuvalkirstain/PickScore_v1", None, "3.9 GB"),))

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        return close_scores(self._gaps, self._clip.logit_scale * self._clip.cosine(images, prompts))
