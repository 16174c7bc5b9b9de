"""Qwen-Image, through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from opd_ds.models.base import JOINT_ATTENTION, ModelFamily
from opd_ds.models.conditioning import Conditioning


class QwenImage(ModelFamily):
    """Joint blocks over image and text (Qwen2.5-VL); an image is the only frame of a video VAE.

    `guidance` is the pipeline's `true_cfg_scale`, with the negative prompt given: without one the pipeline does not
    guide at all, and the model's card and public code give a blank.
    """

    pipeline_class = "QwenImagePipeline"
    transformer_class = "QwenImageTransformer2DModel"
    example = "Qwen/Qwen-Image"
    transformer_keys = ("in_channels", "out_channels", "patch_size", "joint_attention_dim")
    vae_class = "AutoencoderKLQwenImage"
    vae_keys = ("z_dim", "dim_mult", "temperal_downsample", "latents_mean", "latents_std")
    lora_targets = JOINT_ATTENTION
    default_negative_prompt = " "
    guides_in_two_calls = True  # as the pipeline does

    def default_size(self) -> tuple[int, int]:
        return 128 * self._vae_factor, 128 * self._vae_factor  # the pipeline's; no config says it

    @property
    def size_unit(self) -> int:
        return 2 * self._vae_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self._vae_factor
        return self._transformer_config["in_channels"] // 4, self.height // factor, self.width // factor

    @property
    def _vae_factor(self) -> int:
        return 2 ** len(self._vae_config["temperal_downsample"])

    def sigmas(self, steps: int) -> Tensor:
        return self._evenly_then_shifted(steps, self._linear_mu(prod(self.latent_shape[1:]) // 4))

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, mask = pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_text_length)
        if mask is None:  # all prompts are equally long
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return Conditioning({"embeds": embeds.to(self.dtype), "mask": mask.bool()})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        h, w = latents.shape[-2:]
        longest = max(cond.lengths)
        tokens = transformer(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=(sigma * 1000).to(self.dtype) / 1000,  # rounded where the pipeline rounds
            encoder_hidden_states=cond.tensors["embeds"][:, :longest],
            # Without a mask attention may take its faster kernels.
            encoder_hidden_states_mask=None if min(cond.lengths) == longest else cond.tensors["mask"][:, :longest],
            img_shapes=[[(1, h // 2, w // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(tokens, h, w)

    def combine(self, v_uncond: Tensor, v_cond: Tensor, guidance: float) -> Tensor:
        """Each token of the combination is scaled to the norm of the prompt's own."""
        combined, own = pack(super().combine(v_uncond, v_cond, guidance)), pack(v_cond)
        scale = own.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return unpack(combined * scale, *v_cond.shape[-2:])

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values).view(-1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0][:, :, 0]


def _text_length(states: Tensor, mask: Tensor | None) -> tuple[int, None, Tensor | None]:
    """(Length of the text, nothing, mask). diffusers' own also finds each prompt's length, which its network drops, and
    for that copies a number to the device, which the host waits for at every forward (0.42.1).
    """
    return states.shape[1], None, None if mask is None else mask.bool()


transformer_qwenimage.compute_text_seq_len_from_mask = _text_length


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to tokens [B, h/2 * w/2, 4C], one for each patch of 2x2."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, h/2 * w/2, 4C] to latents [B, C, h, w] of `height` x `width`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)
