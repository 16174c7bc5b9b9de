"""Wan 2.1 and 2.2 text-to-video with one network, through diffusers' own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn.functional import pad

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.base import ModelFamily
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.videos import check_frames

_SCHEDULERS = {one.__name__: one for one in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)}


class Wan(ModelFamily):
    """Self-attention over the video's patches, cross-attention to UMT5's states; latents are [B, C, f, h, w].

    Raises:
        UserError: beside what all families refuse: two networks for two ranges of sigma (Wan 2.2 A14B), a network that
            takes an image, another scheduler than flow matching's, a number of frames other than 4k + 1.
    """

    pipeline_class = "WanPipeline"
    transformer_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    transformer_keys: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels", "patch_size", "text_dim")
    vae_keys = ("z_dim", "latents_mean", "latents_std", "scale_factor_spatial", "scale_factor_temporal")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
    example = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    default_frames = 81

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self._check_networks()
        super().__init__(path, **settings)
        self._check_pictures()
        if self._index.get("expand_timesteps"):  # Wan 2.2 TI2V-5B
            self.fps = 24.0
        self._scheduler()

    def default_size(self) -> tuple[int, int]:
        return 480, 832  # as the pipeline's

    @property
    def size_unit(self) -> int:
        return self._spatial_factor * self._transformer_config["patch_size"][1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        assert self.frames is not None
        frames = (self.frames - 1) // self._temporal_factor + 1
        factor = self._spatial_factor
        return self._transformer_config["in_channels"], frames, self.height // factor, self.width // factor

    def sequence_lengths(self) -> dict[str, int]:
        lengths = zip(self.latent_shape[1:], self._transformer_config["patch_size"], strict=True)
        return {"tokens of a video": prod(length // patch for length, patch in lengths)}

    @property
    def _spatial_factor(self) -> int:
        return self._vae_config.get("scale_factor_spatial", 8)  # released folders may leave the default out

    @property
    def _temporal_factor(self) -> int:
        return self._vae_config.get("scale_factor_temporal", 4)

    def sigmas(self, steps: int) -> Tensor:
        """The folder's own grid. Released folders come with UniPC, whose flow sigmas these then are (the first is
        1 - 1e-6); its steps are not those of our kernels. With FlowMatchEulerDiscreteScheduler in the folder, `euler`
        draws what the pipeline draws.
        """
        scheduler = self._scheduler()
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.to(torch.float64)

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        length = self.max_text_length
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        # The pipeline zeroes the states of padding and attends to them all the same: `velocity` puts the zeros back.
        cleaned = [privates.wan_prompt_clean()(prompt) for prompt in prompts]
        tokens = pipeline.tokenizer(cleaned, padding=True, max_length=length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(self.device).bool()
        return Conditioning({"embeds": embeds[:, : mask.shape[1]].to(self.dtype), "mask": mask})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._ask(transformer, latents.to(self.dtype), sigma, cond)

    def _ask(
        self, transformer: Callable[..., Any], inputs: Tensor, sigma: Tensor, cond: Conditioning, **more: Tensor
    ) -> Tensor:
        embeds = cond.tensors["embeds"]
        return transformer(
            hidden_states=inputs,
            timestep=sigma.float() * self._scheduler_config.get("num_train_timesteps", 1000),
            encoder_hidden_states=pad(embeds, (0, 0, 0, self.max_text_length - embeds.shape[1])),
            **more,
            return_dict=False,
        )[0]

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = latent_statistics(vae, latents)
        return vae.decode(latents * std + mean, return_dict=False)[0].transpose(1, 2)

    def _scheduler(self) -> Any:
        config = self._scheduler_config
        name = config.get("_class_name")
        is_unipc = name == UniPCMultistepScheduler.__name__
        if name not in _SCHEDULERS or config.get("use_dynamic_shifting") or (is_unipc and not _is_flow(config)):
            raise UserError(
                f"model.path = {self.path}: its scheduler ({name}) has no fixed flow-matching grid; allowed: "
                "FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with use_flow_sigmas and "
                "prediction_type = 'flow_prediction'; both without use_dynamic_shifting"
            )
        return _SCHEDULERS[name].from_config(config)

    def _check_size(self, key: str = "model.height x model.width", hint: str = "") -> None:
        super()._check_size(key, hint)
        assert self.frames is not None
        check_frames(self.frames, self._temporal_factor)

    def _check_networks(self) -> None:
        parts = self._index
        if parts.get("boundary_ratio") is not None or any(parts.get("transformer_2") or ()):
            raise UserError(
                f"model.path = {self.path}: two networks for two ranges of sigma (transformer_2, boundary_ratio = "
                f"{parts.get('boundary_ratio')}), as in Wan 2.2 A14B; set model.family = 'wan_a14b'"
            )

    @property
    def _index(self) -> dict[str, Any]:
        """Of the pipeline's parts and settings; empty where there is none, as beside a plan's configurations."""
        file = self.path / "model_index.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _check_pictures(self) -> None:
        config = self._transformer_config
        if config.get("image_dim") is not None or config["in_channels"] != self._vae_config["z_dim"]:
            raise UserError(
                f"model.path = {self.path}: its network takes an image beside the text (in_channels = "
                f"{config['in_channels']}, latents have {self._vae_config['z_dim']}); give a text-to-video model, or "
                "set model.family = 'wan_i2v'"
            )


def latent_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the VAE's latents, which the network's have not: [1, C, 1, 1, 1], as `latents` are."""
    mean, std = (
        torch.tensor(getattr(vae.config, name), device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return mean, std


def _is_flow(config: dict[str, Any]) -> bool:
    return bool(config.get("use_flow_sigmas")) and config.get("prediction_type") == "flow_prediction"
