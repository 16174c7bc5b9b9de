"""Qwen-Image and Qwen-Image-Edit, through diffusers' own classes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline
from diffusers.models.transformers import transformer_qwenimage
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import BatchFeature, Qwen2Tokenizer

from opd_ds.models.base import JOINT_ATTENTION, ModelFamily
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.libraries import load

_PICTURE = "<|image_pad|>"


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
        return self._encoded(
            *pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_text_length)
        )

    def _encoded(self, embeds: Tensor, mask: Tensor | None) -> Conditioning:
        if mask is None:  # all prompts are equally long
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return Conditioning({"embeds": embeds.to(self.dtype), "mask": mask.bool()})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        pictures = [latents.to(self.dtype), *cond.stacked_references()]
        patches = [(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in pictures]
        longest = max(cond.lengths)
        tokens = transformer(
            hidden_states=torch.cat([pack(picture) for picture in pictures], dim=1),
            timestep=(sigma * 1000).to(self.dtype) / 1000,  # rounded where the pipeline rounds
            encoder_hidden_states=cond.tensors["embeds"][:, :longest],
            # Without a mask attention may take its faster kernels.
            encoder_hidden_states_mask=None if min(cond.lengths) == longest else cond.tensors["mask"][:, :longest],
            img_shapes=[patches] * len(latents),
            return_dict=False,
        )[0]
        return unpack(tokens[:, : prod(patches[0])], *latents.shape[-2:])

    def combine(self, v_uncond: Tensor, v_cond: Tensor, guidance: float) -> Tensor:
        """Each token of the combination is scaled to the norm of the prompt's own."""
        combined, own = pack(super().combine(v_uncond, v_cond, guidance)), pack(v_cond)
        scale = own.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return unpack(combined * scale, *v_cond.shape[-2:])

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _scaling(vae, latents)
        return vae.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0][:, :, 0]


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: Qwen-Image whose reference picture stands behind the latents, and is read by Qwen2.5-VL together
    with the prompt, also with the negative one. Prompts without a picture are encoded as Qwen-Image encodes them.
    """

    pipeline_class = "QwenImageEditPipeline"
    example = "Qwen/Qwen-Image-Edit"
    takes_pictures = 1
    sees_pictures = True

    def given_parts(self) -> dict[str, Any]:
        return {**super().given_parts(), "processor": TextAndPictures.read(self.path)}

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        plain = QwenImagePipeline(None, None, pipeline.text_encoder, pipeline.tokenizer, None)
        return super().encode_with(plain, prompts)

    def encode_seen_with(self, pipeline: Any, prompt: str, pictures: list[Image]) -> Conditioning:
        seen = [self.shown(picture) for picture in pictures]
        return self._encoded(*pipeline.encode_prompt([prompt], seen, device=self.device))

    def shown(self, picture: Image) -> Image:
        """What Qwen2.5-VL sees of it."""
        return self.fit(picture)

    def seen_tokens(self, size: tuple[int, int]) -> int:
        return _seen(self.fitted_size(size))

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return _of_area(self.reference_side or 1024, size)

    def encode_picture_with(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        mean, std = _scaling(vae, latents)
        return (latents - mean) / std


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-2509 and later: several pictures, of which Qwen2.5-VL sees small copies."""

    pipeline_class = "QwenImageEditPlusPipeline"
    example = "Qwen/Qwen-Image-Edit-2509"
    takes_pictures = 16

    def shown(self, picture: Image) -> Image:
        return picture.resize(_of_area(384, picture.size), Resampling.LANCZOS)

    def seen_tokens(self, size: tuple[int, int]) -> int:
        return _seen(_of_area(384, size))


class TextAndPictures:
    """What Qwen2.5-VL is given of texts and their pictures.

    transformers' own processor reads videos as well, and for that asks for torchvision.
    """

    def __init__(self, pictures: Any, tokenizer: Any) -> None:
        self._pictures, self._tokenizer = pictures, tokenizer

    @classmethod
    def read(cls, folder: Path) -> TextAndPictures:
        """From the folder of a pipeline.

        Raises:
            UserError: a file is damaged.
        """
        from transformers import Qwen2VLImageProcessor  # speaks of torchvision where that is missing

        parts = ((Qwen2VLImageProcessor, "processor"), (Qwen2Tokenizer, "tokenizer"))
        return cls(*(load(kind, folder / name, name) for kind, name in parts))

    def __call__(self, text: list[str], images: Any, *, padding: bool, return_tensors: str) -> BatchFeature:
        """Each `<|image_pad|>` of `text` stands for the next of `images`, and becomes as many as that has tokens."""
        seen = self._pictures(images=images, return_tensors=return_tensors)
        tokens = iter((seen["image_grid_thw"].prod(-1) // self._pictures.merge_size**2).tolist())
        whole = [re.sub(re.escape(_PICTURE), lambda _: _PICTURE * next(tokens), one) for one in text]
        return BatchFeature({**self._tokenizer(whole, padding=padding, return_tensors=return_tensors), **seen})


def _seen(size: tuple[int, int]) -> int:
    """Tokens of Qwen2.5-VL: one for each 28 x 28 pixels."""
    return round(size[0] / 28) * round(size[1] / 28)


def _of_area(side: int, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the area of a square, in the proportions of `size`, to multiples of 32 pixels."""
    width = math.sqrt(side**2 * size[0] / size[1])
    height = width / (size[0] / size[1])
    return max(1, round(width / 32)) * 32, max(1, round(height / 32)) * 32


def _scaling(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the VAE's latents, [C, 1, 1], as `latents` are."""
    mean, std = (
        torch.tensor(values).view(-1, 1, 1).to(latents) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


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
