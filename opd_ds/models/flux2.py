"""FLUX.2 klein, through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pixel_shuffle

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.base import JOINT_ATTENTION, ModelFamily
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.flux import positions

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
                f"model.path = {path}: a {index['_class_name']}, but model.family = flux2 is FLUX.2 klein "
                f"({self.pipeline_class}); choose a klein model"
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
        embeds, (rows, columns) = cond.tensors["embeds"], latents.shape[2:]
        tokens = transformer(
            hidden_states=latents.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=(sigma * 1000).to(self.dtype) / 1000,  # sigma, rounded as the pipeline rounds it
            encoder_hidden_states=embeds,
            txt_ids=positions(1, 1, 1, embeds.shape[1], device=embeds.device),
            img_ids=positions(1, rows, columns, 1, device=latents.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.dtype)
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(latents.dtype)
        return vae.decode(pixel_shuffle(latents * std + mean, _PATCH), return_dict=False)[0]
