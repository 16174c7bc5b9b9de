"""Wan 2.1 image to video: a picture is the first frame. Through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL.Image import Image
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.wan import Wan, latent_statistics
from opd_ds.utils.pictures import Picture

# This pipeline's own fails where ftfy is not installed, the others' does without (diffusers 0.42.1).
pipeline_wan_i2v.prompt_clean = privates.wan_prompt_clean()

_TEXT = 512  # tokens; diffusers' attention (0.42.1) counts the picture's from there


class WanI2V(Wan):
    """Beside the latents the network takes those of a video of the picture and nothing after it, and which of its
    latents are given; its cross-attention takes CLIP's states of the picture.

    Raises:
        UserError: beside what Wan refuses: a network without such inputs, another `max_text_length` than 512.
    """

    pipeline_class = "WanImageToVideoPipeline"
    example = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    transformer_keys = (*Wan.transformer_keys, "image_dim")
    takes_pictures = 1
    sees_pictures = True
    needs_pictures = True
    fits_pictures_to_image = True

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._vae_config["z_dim"], *super().latent_shape[1:]

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """That of the video."""
        return self.width, self.height

    def picture_name(self, picture: Picture) -> str:
        return f"{super().picture_name(picture)} {self.frames}"

    def encode_picture_with(self, vae: Any, pixels: Tensor) -> Tensor:
        """Which latents are given [1, 4, f, h, w], and the latents of the picture's video [1, C, f, h, w]."""
        assert self.frames is not None
        rest = pixels.new_zeros(*pixels.shape[:2], self.frames - 1, *pixels.shape[2:])
        latents = vae.encode(torch.cat([pixels[:, :, None], rest], dim=2)).latent_dist.mode()
        mean, std = latent_statistics(vae, latents)
        given = latents.new_zeros(1, self._temporal_factor, *latents.shape[2:])
        given[:, :, 0] = 1
        return torch.cat([given, (latents - mean) / std], dim=1)

    def encode_seen_with(self, pipeline: Any, prompt: str, pictures: list[Image]) -> Conditioning:
        text = self.encode_with(pipeline, [prompt])
        states = pipeline.encode_image(pictures[0], self.device)
        return Conditioning({**text.tensors, "picture": states.to(self.dtype)}, text.lengths)

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        (given,) = cond.stacked_references()
        states = {"encoder_hidden_states_image": cond.tensors["picture"]}
        return self._ask(transformer, torch.cat([latents.to(self.dtype), given], dim=1), sigma, cond, **states)

    def _check_pictures(self) -> None:
        config, latents = self._transformer_config, self._vae_config["z_dim"]
        wanted = 2 * latents + self._temporal_factor
        if config.get("image_dim") is None or config["in_channels"] != wanted:
            raise UserError(
                f"model.path = {self.path}: its network has in_channels = {config['in_channels']} and image_dim = "
                f"{config.get('image_dim')}; one that takes a first frame has {wanted} and CLIP's width, as Wan 2.1 "
                "image to video"
            )
        if self.max_text_length != _TEXT:
            raise UserError(f"model.max_text_length = {self.max_text_length}: must be {_TEXT}; remove it")
