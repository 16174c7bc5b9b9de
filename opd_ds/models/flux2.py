"""FLUX.2 klein and dev, through diffusers' own classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoTokenizer

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.base import JOINT_ATTENTION, ModelFamily
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.flux import positions
from opd_ds.models.libraries import load
from opd_ds.utils.pictures import Picture

_APART = 10  # times between pictures; the latents' own is 0
_LEAST_SIDE, _MOST_RATIO = 64, 8  # of a reference picture
_PATCH = 2  # the pipeline's own and in no config; the network's `patch_size` of 1 is beside it


class Flux2(ModelFamily):
    """Joint, then single blocks over states of three layers of Qwen3 and patches of the latents.

    Latents are what the pipeline draws its noise as, [B, 4 * VAE channels, H/16, W/16]: 2x2 patches already in the
    channels, normalised by the running statistics of the VAE's batch norm. The network sees padding as text, so
    `max_text_length` changes images: 512 is what diffusers' pipeline takes.

    Raises:
        UserError: a folder of another FLUX.2 pipeline, whose text encoder differs.
    """

    pipeline_class = "Flux2KleinPipeline"
    transformer_class = "Flux2Transformer2DModel"
    example = "black-forest-labs/FLUX.2-klein-4B"
    vae_class = "AutoencoderKLFlux2"
    transformer_keys = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "rope_theta")
    vae_keys = ("latent_channels", "block_out_channels", "patch_size", "batch_norm_eps")
    takes_pictures = 10
    lora_targets = (
        *JOINT_ATTENTION,
        # Of the single blocks: query, key, value and the first layer of the MLP are one matrix.
        "attn.to_qkv_mlp_proj",
    )

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        index = self._read_config("model_index.json")
        if index["_class_name"] != self.pipeline_class:
            raise UserError(
                f"model.path = {path}: a {index['_class_name']}, but this family is of {self.pipeline_class}; "
                "model.family = flux2 is FLUX.2 klein, flux2_dev is FLUX.2 dev"
            )
        self._distilled = index.get("is_distilled", False)

    @property
    def unguided(self) -> bool:
        return self._distilled  # its pipeline ignores guidance

    def default_size(self) -> tuple[int, int]:
        size = self._vae_config["sample_size"]
        return size, size

    @property
    def size_unit(self) -> int:
        return self._vae_factor * _PATCH

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._transformer_config["in_channels"], self.height // self.size_unit, self.width // self.size_unit

    def sigmas(self, steps: int) -> Tensor:
        _, rows, columns = self.latent_shape
        return self._evenly_then_shifted(steps, privates.empirical_shift()(rows * columns, steps))

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_text_length)
        return Conditioning({"embeds": embeds.to(self.dtype)})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._pass(transformer, latents, sigma, cond, None)

    def _pass(
        self,
        transformer: Callable[..., Any],
        latents: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        guidance: Tensor | None,
    ) -> Tensor:
        embeds, (rows, columns) = cond.tensors["embeds"], latents.shape[2:]
        pictures = [latents.to(self.dtype), *cond.stacked_references()]
        tokens = transformer(
            hidden_states=torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], dim=1),
            timestep=(sigma * 1000).to(self.dtype) / 1000,  # sigma, rounded as the pipeline rounds it
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=positions(1, 1, 1, embeds.shape[1], device=embeds.device),
            img_ids=torch.cat([_places(picture, _APART * number) for number, picture in enumerate(pictures)]),
            return_dict=False,
        )[0][:, : rows * columns]
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = self._shrunk(size)
        return width // self.size_unit * self.size_unit, height // self.size_unit * self.size_unit

    def fit(self, picture: Image) -> Image:
        """Large pictures are made smaller; what is over a multiple of the patch is cut off on both sides."""
        picture = picture.resize(self._shrunk(picture.size), Resampling.LANCZOS)
        width, height = self.fitted_size(picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    def _shrunk(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = (self.reference_side or 1024) / math.sqrt(size[0] * size[1])
        return size if scale >= 1 else (int(size[0] * scale), int(size[1] * scale))

    def flaw_of(self, picture: Picture) -> str:
        """The pipeline's own limits."""
        width, height = picture.size
        if min(width, height) < _LEAST_SIDE:
            return f"{width} x {height} pixels; FLUX.2 takes pictures of {_LEAST_SIDE} x {_LEAST_SIDE} and more"
        if max(width, height) > _MOST_RATIO * min(width, height):
            return f"{width} x {height} pixels; FLUX.2 takes proportions of up to {_MOST_RATIO} to 1"
        return ""

    def encode_picture_with(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), _PATCH)
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        return vae.decode(pixel_shuffle(latents * std + mean, _PATCH), return_dict=False)[0]


class Flux2Dev(Flux2):
    """FLUX.2 dev: another text encoder (Mistral), and the guidance scale as an input."""

    pipeline_class = "Flux2Pipeline"
    example = "black-forest-labs/FLUX.2-dev"
    embedded_guidance = True

    def given_parts(self) -> dict[str, Any]:
        # The folder's own is a processor of texts and pictures, which asks for torchvision; it is given texts only.
        return {**super().given_parts(), "tokenizer": load(AutoTokenizer, self.path / "tokenizer", "tokenizer")}

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
        scale = torch.full_like(sigma, guidance, dtype=torch.float32)
        return self._pass(transformer, latents, sigma, cond, scale)


def _places(latents: Tensor, time: int) -> Tensor:
    """Of each token, (time, row, column, 0): int64 [h * w, 4]."""
    return positions(1, *latents.shape[2:], 1, device=latents.device, start=time)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and standard deviation of the latents' channels, [1, 4C, 1, 1]."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.dtype)
    return mean, (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(latents.dtype)
