"""FLUX.1 (dev, schnell without guidance, Kontext with pictures), through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from opd_ds.models import privates
from opd_ds.models.base import JOINT_ATTENTION, ModelFamily
from opd_ds.models.conditioning import Conditioning

_PATCH = 2  # the pipeline's own and in no config; the network's `patch_size` of 1 is beside it


class Flux(ModelFamily):
    """Joint, then single blocks over T5's states and 2x2 patches of the latents; CLIP's pooled state and the guidance
    scale beside the timestep.

    Padding is seen as text, so `max_text_length` changes images: 512 is what diffusers' pipeline takes.
    """

    pipeline_class = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    example = "black-forest-labs/FLUX.1-dev"
    transformer_keys = (
        "in_channels",
        "out_channels",
        "patch_size",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
    )
    lora_targets = JOINT_ATTENTION
    embedded_guidance = True

    @property
    def unguided(self) -> bool:
        return not self._transformer_config["guidance_embeds"]  # schnell

    def default_size(self) -> tuple[int, int]:
        size = self._vae_config["sample_size"]
        return size, size

    @property
    def size_unit(self) -> int:
        return self._vae_factor * _PATCH

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self._vae_factor
        return self._transformer_config["in_channels"] // _PATCH**2, self.height // factor, self.width // factor

    def sigmas(self, steps: int) -> Tensor:
        tokens = (self.height // self.size_unit) * (self.width // self.size_unit)
        return self._evenly_then_shifted(steps, self._linear_mu(tokens))

    def sequence_lengths(self) -> dict[str, int]:
        tokens = (self.height // self.size_unit) * (self.width // self.size_unit)
        return {"tokens of an image": tokens, "tokens of a prompt (model.max_text_length)": self.max_text_length}

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_text_length
        )
        return Conditioning({"embeds": embeds.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self.guided_velocity(transformer, latents, sigma, cond, cond, 1.0)

    def guided_velocity(
        self,
        transformer: Callable[..., Any],
        latents: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: float,
        stage: int = 0,
    ) -> Tensor:
        """One pass at any guidance: the scale is an input of the network; `uncond` is not used."""
        self.check_guidance("guidance", guidance)
        embeds, (rows, columns) = cond.tensors["embeds"], (size // _PATCH for size in latents.shape[2:])
        pictures = [latents.to(self.dtype), *cond.stacked_references()]
        patches = transformer(
            hidden_states=torch.cat([_tokens(picture) for picture in pictures], dim=1),
            timestep=(sigma * 1000).to(self.dtype) / 1000,  # sigma, rounded as the pipeline rounds it
            guidance=torch.full_like(sigma, guidance, dtype=torch.float32) if not self.unguided else None,
            encoder_hidden_states=embeds,
            pooled_projections=cond.tensors["pooled"],
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device),
            img_ids=torch.cat([_places(picture, number) for number, picture in enumerate(pictures)]),
            return_dict=False,
        )[0][:, : rows * columns]
        return pixel_shuffle(patches.transpose(1, 2).unflatten(2, (rows, columns)), _PATCH)


class FluxKontext(Flux):
    """FLUX.1 Kontext: FLUX.1 whose reference picture stands behind the latents, as one of a later frame."""

    pipeline_class = "FluxKontextPipeline"
    example = "black-forest-labs/FLUX.1-Kontext-dev"
    takes_pictures = 1

    def sequence_lengths(self) -> dict[str, int]:
        return {}  # how many tokens a picture adds is the picture's own

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The nearest in aspect ratio of the sizes that the model was trained on."""
        ratio, scale = size[0] / size[1], (self.reference_side or 1024) / 1024
        _, *fitted = min((abs(ratio - width / height), width, height) for width, height in privates.kontext_sizes())
        width, height = (max(1, int(pixels * scale) // self.size_unit) * self.size_unit for pixels in fitted)
        return width, height

    def encode_picture_with(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _tokens(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to tokens [B, h/2 * w/2, 4C]. In memory as the pipeline has them: the product with another
    order rounds differently in bf16.
    """
    return pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2).contiguous()


def _places(latents: Tensor, frame: int) -> Tensor:
    """Of each token, (frame, row, column): int64 [h/2 * w/2, 3]."""
    rows, columns = (size // _PATCH for size in latents.shape[2:])
    return positions(1, rows, columns, device=latents.device, start=frame)


def positions(*lengths: int, device: torch.device, start: int = 0) -> Tensor:
    """Places in a grid for rotary embeddings, in reading order: int64 [product of lengths, len(lengths)]; the first
    axis counts from `start`.
    """
    first = torch.arange(start, start + lengths[0], device=device)
    return torch.cartesian_prod(first, *(torch.arange(length, device=device) for length in lengths[1:]))
