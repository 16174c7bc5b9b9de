"""Z-Image, through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd_ds.models.base import ModelFamily
from opd_ds.models.conditioning import Conditioning


class ZImage(ModelFamily):
    """Single-stream blocks over image and text (Qwen3), each prompt with its own length.

    The pipeline guides by v_cond + guidance_scale * (v_cond - v_uncond), and not at all with guidance_scale 0. Here, as
    for other families, 1 is no guidance: `guidance` is the pipeline's `guidance_scale` + 1.
    """

    pipeline_class = "ZImagePipeline"
    transformer_class = "ZImageTransformer2DModel"
    example = "Tongyi-MAI/Z-Image"
    transformer_keys = ("in_channels", "all_patch_size", "all_f_patch_size", "cap_feat_dim", "t_scale")
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    guides_in_two_calls = True

    def default_size(self) -> tuple[int, int]:
        return 1024, 1024  # the pipeline's; no config says it

    @property
    def size_unit(self) -> int:
        return 2 * self._vae_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self._vae_factor
        return self._transformer_config["in_channels"], self.height // factor, self.width // factor

    def sigmas(self, steps: int) -> Tensor:
        return self._evenly_then_shifted(steps, self._linear_mu(prod(self.latent_shape[1:]) // 4))

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(
            list(prompts),  # the pipeline writes its chat template into the list
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_length,
        )
        mask = [torch.ones(len(states), dtype=torch.bool, device=states.device) for states in embeds]
        padded = pad_sequence(embeds, batch_first=True).to(self.dtype)
        return Conditioning({"embeds": padded, "mask": pad_sequence(mask, batch_first=True)})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        pictures = transformer(
            x=list(latents.to(self.dtype).unsqueeze(2)),
            t=(1000 - sigma * 1000) / 1000,
            cap_feats=[states[:length] for states, length in zip(cond.tensors["embeds"], cond.lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(pictures).squeeze(2)

    def combine(self, v_uncond: Tensor, v_cond: Tensor, guidance: float) -> Tensor:
        """In float32, as the pipeline does it."""
        own = v_cond.float()
        return (own + (guidance - 1) * (own - v_uncond.float())).to(v_cond.dtype)
