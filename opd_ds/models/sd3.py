"""Stable Diffusion 3 and 3.5, through diffusers' own classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from opd_ds.errors import UserError
from opd_ds.models.base import Conditioning

# What makes two checkpoints comparable step by step: the same grid, the same network interface, the same latents.
_SCHEDULER_KEYS = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "invert_sigmas")
_TRANSFORMER_KEYS = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
_VAE_KEYS = ("latent_channels", "scaling_factor", "shift_factor", "block_out_channels")


class SD3:
    """The SD3 family around one diffusers folder (see `ModelFamily`).

    Args:
        path: folder in StableDiffusion3Pipeline layout.
        dtype: dtype of network, text encoders and VAE.
        device: where encoding and decoding happen.
        height, width: picture size in pixels; None takes the transformer's own sample size.
        max_text_length: T5 tokens (CLIP lengths come from the tokenizers).
        text_encoders: `resident` keeps them on the device, `offload` brings them there only to encode.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        height: int | None = None,
        width: int | None = None,
        max_text_length: int = 128,
        text_encoders: Literal["resident", "offload"] = "offload",
    ) -> None:
        self.path, self.dtype, self.device = path, dtype, device
        self.max_text_length = max_text_length
        self._keep_encoders = text_encoders == "resident"
        self._transformer_config = _read_config(path, "transformer/config.json")
        self._vae_config = _read_config(path, "vae/config.json")
        self._scheduler_config = _read_config(path, "scheduler/scheduler_config.json")
        if self._transformer_config.get("_class_name") != "SD3Transformer2DModel":
            found = self._transformer_config.get("_class_name")
            raise UserError(f"model.path = {path}: transformer is a {found}, family 'sd3' needs SD3Transformer2DModel")
        self._vae_factor = 2 ** (len(self._vae_config["block_out_channels"]) - 1)
        size = self._transformer_config["sample_size"] * self._vae_factor
        self.height, self.width = height or size, width or size
        unit = self._vae_factor * self._transformer_config["patch_size"]
        if self.height % unit or self.width % unit:
            raise UserError(
                f"model.height x model.width = {self.height}x{self.width}: both must be multiples of {unit} "
                "(VAE factor times patch size)"
            )
        self._encoders: StableDiffusion3Pipeline | None = None
        self._vae: AutoencoderKL | None = None
        self._vae_lock = Lock()  # pictures are also decoded beside the training

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self._vae_factor
        return self._transformer_config["in_channels"], self.height // factor, self.width // factor

    def sigmas(self, steps: int) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
        shifting: dict[str, float] = {}
        if scheduler.config.use_dynamic_shifting:
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            _, h, w = self.latent_shape
            tokens = (h // self._transformer_config["patch_size"]) * (w // self._transformer_config["patch_size"])
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            shifting["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(steps, **shifting)
        return scheduler.sigmas.to(torch.float64)

    def load_transformer(self, path: Path | None = None) -> nn.Module:
        folder = path or self.path
        subfolder = "transformer" if (folder / "transformer").is_dir() else None
        return SD3Transformer2DModel.from_pretrained(folder, subfolder=subfolder, dtype=self.dtype)

    def check_same_world(self, path: Path) -> None:
        checks = [
            ("transformer/config.json", _TRANSFORMER_KEYS, self._transformer_config),
            ("config.json", _TRANSFORMER_KEYS, self._transformer_config),
            ("scheduler/scheduler_config.json", _SCHEDULER_KEYS, self._scheduler_config),
            ("vae/config.json", _VAE_KEYS, self._vae_config),
        ]
        for file, keys, ours in checks:
            if not (path / file).is_file():
                continue
            theirs = json.loads((path / file).read_text())
            for key in keys:
                if theirs.get(key) != ours.get(key):
                    raise UserError(
                        f"teacher {path}: {file} has {key} = {theirs.get(key)!r}, the student has {ours.get(key)!r}; "
                        "teacher and student must share scheduler, network interface and latent space"
                    )

    def encode(self, prompts: list[str]) -> Conditioning:
        if self._encoders is None:
            self._encoders = StableDiffusion3Pipeline.from_pretrained(
                self.path, transformer=None, vae=None, dtype=self.dtype
            )
        self._encoders.to(self.device)
        with torch.no_grad():
            embeds, _, pooled, _ = self._encoders.encode_prompt(
                prompts,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_text_length,
            )
        if not self._keep_encoders:
            self._encoders.to("cpu")
        return Conditioning(embeds.to(self.dtype), pooled.to(self.dtype))

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return transformer(
            hidden_states=latents.to(self.dtype),
            timestep=sigma.float() * self._scheduler_config.get("num_train_timesteps", 1000),
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        with self._vae_lock:
            if self._vae is None:
                vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", dtype=self.dtype)
                self._vae = vae.requires_grad_(False).eval().to(self.device)
        config = self._vae.config
        with torch.no_grad():
            pictures = self._vae.decode(
                latents.to(self.device, self.dtype) / config.scaling_factor + config.shift_factor, return_dict=False
            )[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def save_full(self, transformer_state: dict[str, Tensor], folder: Path) -> None:
        """The student's network beside copies of the base folder's other parts: a pipeline of its own."""
        shutil.copytree(self.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        transformer = SD3Transformer2DModel.from_config(self._transformer_config)
        transformer.load_state_dict(transformer_state)
        transformer.to(self.dtype).save_pretrained(folder / "transformer")

    def save_lora(self, adapter_state: dict[str, Tensor], lora_config: Any, folder: Path) -> None:
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=adapter_state,
            transformer_lora_adapter_metadata=lora_config.to_dict(),
        )


def _read_config(path: Path, file: str) -> dict[str, Any]:
    if not (path / file).is_file():
        raise UserError(
            f"model.path = {path}: no {file}; expected a diffusers folder in StableDiffusion3Pipeline layout"
        )
    return json.loads((path / file).read_text())
