"""Stable Diffusion 3 and 3.5, through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.models.base import JOINT_ATTENTION, ModelFamily
from opd_ds.models.conditioning import Conditioning


class SD3(ModelFamily):
    """Joint blocks over image and text (two CLIPs and T5), pooled CLIP states beside the timestep."""

    pipeline_class = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    transformer_keys = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
    default_text_length = 128  # as in DiffusionOPD; the pipeline's is 256
    example = "stabilityai/stable-diffusion-3.5-medium"
    # Where the released DiffusionOPD teachers adapt.
    lora_targets = JOINT_ATTENTION

    def default_size(self) -> tuple[int, int]:
        size = self._transformer_config["sample_size"] * self._vae_factor
        return size, size

    @property
    def size_unit(self) -> int:
        return self._vae_factor * self._transformer_config["patch_size"]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        factor = self._vae_factor
        return self._transformer_config["in_channels"], self.height // factor, self.width // factor

    def _check_size(self, key: str = "model.height x model.width", hint: str = "") -> None:
        super()._check_size(key, hint)
        most = self._transformer_config.get("pos_embed_max_size", 96) * self.size_unit
        if max(self.height, self.width) > most:
            raise UserError(
                f"{key} = {self.height}x{self.width}: the network has positions for {most} pixels a side{hint}"
            )

    def sigmas(self, steps: int) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
        shifting: dict[str, float] = {}
        if scheduler.config.use_dynamic_shifting:
            _, h, w = self.latent_shape
            tokens = (h // self._transformer_config["patch_size"]) * (w // self._transformer_config["patch_size"])
            shifting["mu"] = self._linear_mu(tokens)
        scheduler.set_timesteps(steps, **shifting)
        return scheduler.sigmas.to(torch.float64)

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_length,
        )
        return Conditioning({"embeds": embeds.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return transformer(
            hidden_states=latents.to(self.dtype),
            timestep=sigma.float() * self._scheduler_config.get("num_train_timesteps", 1000),
            encoder_hidden_states=cond.tensors["embeds"],
            pooled_projections=cond.tensors["pooled"],
            return_dict=False,
        )[0]
