"""LTX-Video, text to video, through diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.models.base import ModelFamily
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.videos import check_frames


class LTX(ModelFamily):
    """Self-attention over the latents of a video, each a token; cross-attention to T5's states. Latents are
    [B, C, f, h, w].

    Raises:
        UserError: beside what all families refuse: a network that puts latents together to patches, a number of frames
            that the VAE does not take.
    """

    pipeline_class = "LTXPipeline"
    transformer_class = "LTXVideoTransformer3DModel"
    vae_class = "AutoencoderKLLTXVideo"
    transformer_keys = ("in_channels", "out_channels", "patch_size", "patch_size_t", "caption_channels")
    vae_keys = ("latent_channels", "scaling_factor", "patch_size", "patch_size_t", "spatio_temporal_scaling")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
    guides_in_two_calls = True  # prompts of one length then need no mask
    default_text_length = 128
    default_frames = 161
    fps = 25.0  # the pipeline's; positions in time are counted by it
    example = "Lightricks/LTX-Video"

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        sizes = [self._transformer_config.get(key, 1) for key in ("patch_size", "patch_size_t")]
        if sizes != [1, 1]:
            raise UserError(f"model.path = {path}: its network makes patches of {sizes} latents; expected one a token")

    def default_size(self) -> tuple[int, int]:
        return 512, 704  # as the pipeline's

    @property
    def size_unit(self) -> int:
        return self._compression("spatial", "patch_size")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        assert self.frames is not None
        frames, unit = (self.frames - 1) // self._temporal_factor + 1, self.size_unit
        return self._transformer_config["in_channels"], frames, self.height // unit, self.width // unit

    @property
    def _temporal_factor(self) -> int:
        return self._compression("temporal", "patch_size_t")

    def _compression(self, kind: str, patch: str) -> int:
        """As the VAE has it: pixels or frames per latent."""
        config = self._vae_config
        return config.get(f"{kind}_compression_ratio") or config[patch] * 2 ** sum(config["spatio_temporal_scaling"])

    def sigmas(self, steps: int) -> Tensor:
        return self._evenly_then_shifted(steps, self._linear_mu(prod(self.latent_shape[1:])))

    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        embeds, mask, *_ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_length,
            device=self.device,
        )
        # T5 sees padding, the network does not.
        longest = int(mask.sum(1).max())
        embeds = embeds[:, :longest] * mask[:, :longest, None]
        return Conditioning({"embeds": embeds.to(self.dtype), "mask": mask[:, :longest].bool()})

    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        longest, (frames, height, width) = max(cond.lengths), latents.shape[2:]
        tokens = transformer(
            hidden_states=latents.to(self.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=cond.tensors["embeds"][:, :longest],
            timestep=sigma.float() * self._scheduler_config.get("num_train_timesteps", 1000),
            # Without a mask attention may take its faster kernels.
            encoder_attention_mask=None if min(cond.lengths) == longest else cond.tensors["mask"][:, :longest],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self._temporal_factor / self.fps, self.size_unit, self.size_unit),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (frames, height, width))

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (values.view(1, -1, 1, 1, 1).to(latents) for values in (vae.latents_mean, vae.latents_std))
        # Decoders that denoise are told that nothing is left to do, as by the pipeline's own defaults.
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        decoded = vae.decode(latents * std / vae.config.scaling_factor + mean, timestep, return_dict=False)[0]
        return decoded.transpose(1, 2)

    def _check_size(self, key: str = "model.height x model.width", hint: str = "") -> None:
        super()._check_size(key, hint)
        assert self.frames is not None
        check_frames(self.frames, self._temporal_factor)
