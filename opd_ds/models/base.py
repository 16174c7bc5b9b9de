"""What a model family is: everything around the denoising network, on one diffusers folder.

A family is one file with a class that fills in `ModelFamily`. What families share (reading the folder, loading,
guidance, offloaded text encoders, saving) is here.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opd_ds.config.sections import AttentionBackend
from opd_ds.config.teachers import QuantizedAs
from opd_ds.errors import UserError, about, shown
from opd_ds.models import lora, privates
from opd_ds.models.attention import check_attention, set_attention
from opd_ds.models.conditioning import Conditioning
from opd_ds.models.inspection import network_folder, read_config, weight_files
from opd_ds.models.libraries import diffusers_class
from opd_ds.models.own_weights import check_own_weights
from opd_ds.models.prompt_encoding import PromptEncoding
from opd_ds.models.quantization import quantizer
from opd_ds.models.sequence_parallel import check_sequences, share_sequences
from opd_ds.models.stored_weights import (
    ParameterBuilder,
    Stored,
    WholeParameters,
    fill,
    lacks_tables,
    open_single_file,
    open_weights,
    shapes_of,
)
from opd_ds.models.two_networks import NoiseStages
from opd_ds.models.weight_files import read_shapes, refuse_other_shapes
from opd_ds.utils.atomic_io import apply_umask

# What makes two checkpoints comparable step by step: the same grid, beside the network interface and latents.
SCHEDULER_KEYS = (
    "num_train_timesteps",
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "invert_sigmas",
    "shift_terminal",
)

# The attention of blocks over image and text, as diffusers names its parts.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class ModelFamily(NoiseStages, PromptEncoding):
    """One diffusion architecture around one diffusers folder; the engines own the network itself.

    Latents are [B, C, h, w] ([B, C, f, h, w] of videos) with x_sigma = (1 - sigma) * x0 + sigma * noise and
    velocity = noise - x0.

    Args:
        path: folder in the layout of `pipeline_class`.
        dtype: dtype of network, text encoders and VAE.
        device: where encoding and decoding happen.
        height, width: image size in pixels; None takes the family's own default.
        frames: of a video; None takes the family's default. Families of images refuse it.
        max_text_length: tokens of the longest prompt (of T5 where there are several encoders); None takes the family's
            default.
        negative_prompt: of the pass without prompt; None takes the family's default.
        text_encoders: `resident` keeps them on the device, `offload` brings them there only to encode.
        decode_micro_batch: images that the VAE decodes at once; None: all that it is given.
        reference_side: reference pictures are resized to the area of a square of so many pixels; None takes what the
            family's pipeline takes.
        attention: the kernel that its networks run attention with; see `check_attention`.
        vae_tiling: it decodes in tiles, as after `enable_tiling` of the pipeline's VAE.

    Raises:
        UserError: a folder of another layout, or a size that the network cannot draw.
    """

    transformer_class: ClassVar[str]  # of diffusers
    transformer_keys: ClassVar[tuple[str, ...]]  # config entries that teacher and student must share
    vae_keys: ClassVar[tuple[str, ...]] = ("latent_channels", "scaling_factor", "shift_factor", "block_out_channels")
    lora_targets: ClassVar[tuple[str, ...]]  # where a LoRA student adapts, unless the run config says it
    default_text_length: ClassVar[int] = 512  # tokens, as the pipeline's own default
    default_negative_prompt: ClassVar[str] = ""  # the pipeline's where none is given, or that of the model's card
    example: ClassVar[str]  # a hub id
    default_frames: ClassVar[int | None] = None  # of a video; None: the family draws images
    fps: float = 16.0  # frames per second at which a video is shown
    embedded_guidance: ClassVar[bool] = False  # the network takes the guidance scale as an input: always one pass
    # Under guidance two calls instead of one of twice the rows: in one call the lengths of prompt and negative prompt
    # differ, and with the mask that this takes attention leaves its fastest kernels.
    guides_in_two_calls: ClassVar[bool] = False
    sequence_mesh: DeviceMesh | None = None  # of ranks that share sequences (`Group.sequence_mesh`)

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        max_text_length: int | None = None,
        negative_prompt: str | None = None,
        text_encoders: Literal["resident", "offload"] = "offload",
        decode_micro_batch: int | None = None,
        reference_side: int | None = None,
        attention: AttentionBackend = "auto",
        vae_tiling: bool = False,
    ) -> None:
        super().__init__(path, dtype, device, resident=text_encoders == "resident")
        self.max_text_length = max_text_length or self.default_text_length
        self.negative_prompt = self.default_negative_prompt if negative_prompt is None else negative_prompt
        self._decoded_at_once, self.vae_tiling = decode_micro_batch, vae_tiling
        if reference_side is not None and not self.takes_pictures:
            raise UserError(
                f"model.reference_side = {reference_side}: {type(self).__name__} takes no reference pictures; remove it"
            )
        self.reference_side = reference_side
        self._attention = attention
        self._transformer_config = self._read_config("transformer/config.json")
        found = self._transformer_config.get("_class_name")
        if found != self.transformer_class:
            raise UserError(f"model.path = {path}: its transformer is {found}, not {self.transformer_class}")
        self._vae_config = self._read_config("vae/config.json")
        self._scheduler_config = self._read_config("scheduler/scheduler_config.json")
        default = self.default_size()
        self.height, self.width = height or default[0], width or default[1]
        if frames is not None and self.default_frames is None:
            raise UserError(f"model.frames = {frames}: {type(self).__name__} draws images; remove model.frames")
        self.frames = frames or self.default_frames
        self.draws_clips = (self.frames or 1) > 1  # a video of one frame is an image
        self._check_size()

    def at(self, height: int, width: int, *, key: str = "height x width", hint: str = "") -> Self:
        """The family at another image size: what it says of latents and sigmas, and how it encodes pictures, is of
        that. What is read from files is read once for all sizes.

        Raises:
            UserError: a size that the network cannot draw, naming `key`, with `hint` at its end.
        """
        other = copy(self)
        other.height, other.width = height, width
        other._check_size(key, hint)
        return other

    # ---- what a family says ----

    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""

    @property
    @abstractmethod
    def size_unit(self) -> int:
        """Height and width must be multiples of this many pixels."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one sample, (C, f, h, w) of a video."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """The inference grid of the folder's own scheduler: float64 [steps+1], from noise to image."""

    @abstractmethod
    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """One pass: latents [B, C, ...], sigma [B] float32 to velocity [B, C, ...] in the model's dtype."""

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B, C, ...] to what the VAE draws, in [-1, 1]: [B, 3, H, W], of videos [B, F, 3, H, W]."""
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    def sequence_lengths(self) -> dict[str, int]:
        """Tokens of a sample that `model.sequence_parallel` divides over ranks, by what they are; none where diffusers
        divides no sequences of the network.
        """
        return {}

    # ---- what families share ----

    def check_steps(self, key: str, steps: int) -> None:
        """Raise UserError when the folder's scheduler has no grid of so many steps. `key`: of `steps` in the config."""
        sigmas = self.sigmas(steps)
        if not bool((sigmas[:-1] > sigmas[1:]).all()):  # false for NaN, too
            raise UserError(
                f"{key} = {steps}: the scheduler of model.path has no grid of {steps} steps (sigmas "
                f"{', '.join(f'{sigma:.3g}' for sigma in sigmas[:4].tolist())}); take more steps"
            )

    @property
    def unguided(self) -> bool:
        """Whether the network was distilled to be run as it is: a guidance other than 1 is refused."""
        return False

    @classmethod
    def passes(cls, guidance: float) -> int:
        """Network passes that one guided velocity costs."""
        return 1 if guidance == 1.0 or cls.embedded_guidance else 2

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
        """Velocity with classifier-free guidance; a guidance of 1 costs one pass.

        Both passes are one batch, or (`guides_in_two_calls`) two. The order in a batch (uncond, cond) and the
        model-dtype arithmetic are those of diffusers' pipelines, so rollout, scoring, training and a user's later
        inference take the same numeric path.

        Args:
            latents: [B, C, ...], any float dtype.
            sigma: [B], float32.
            cond: B encoded prompts.
            uncond: the encoded negative prompt, one for all or one a row; it goes with the pictures of `cond`.
            stage: see `stages`; that of all rows.

        Raises:
            UserError: see `check_guidance`.
        """
        self.check_guidance("guidance", guidance)
        transformer = self.at_stage(transformer, stage)
        if guidance == 1.0:
            return self.velocity(transformer, latents, sigma, cond)
        joined = self.branches(transformer, latents, sigma, cond, uncond)
        return self.combine(*joined, self.guidance_at(guidance, stage))

    def branches(
        self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning, uncond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """What guidance joins, in two passes: the velocities by the negative prompt and by the prompt."""
        uncond = (uncond.expand(len(cond)) if len(uncond) == 1 else uncond).with_references(cond.references)
        if self.guides_in_two_calls:
            v_cond = self.velocity(transformer, latents, sigma, cond)
            return self.velocity(transformer, latents, sigma, uncond), v_cond
        both = Conditioning.cat([uncond, cond])
        v_uncond, v_cond = self.velocity(transformer, torch.cat([latents, latents]), sigma.repeat(2), both).chunk(2)
        return v_uncond, v_cond

    def check_guidance(self, key: str, guidance: float) -> None:
        """Raise UserError, naming `key` of the run config, for a guidance that the model does not know."""
        if self.unguided and guidance != 1.0:
            raise UserError(f"{key} = {guidance:g}: the model is distilled to be run without guidance; allowed: 1.0")

    def check_attention(self) -> None:
        """Raise UserError where the network cannot run attention as `model.attention` says."""
        if self._attention != "auto":
            network, masked = self.empty_transformer(), self.guides_in_two_calls
            check_attention(self._attention, network, dtype=self.dtype, device=self.device, masked=masked)

    def check_sequences(self, ranks: int) -> None:
        """Raise UserError where `model.sequence_parallel` ranks cannot share the network's sequences at this size."""
        if ranks == 1:
            return
        lengths = self.sequence_lengths()
        if not lengths:
            raise UserError(
                f"model.sequence_parallel = {ranks}: sequences of {type(self).__name__} are not divided over ranks; "
                "set it to 1"
            )
        check_sequences(self._transformer_config["num_attention_heads"], lengths, ranks)

    def share_sequences(self, network: nn.Module) -> None:
        """Divide the sequences of a network over the ranks of `sequence_mesh`; its adapters must be there already."""
        if self.sequence_mesh is not None:
            share_sequences(network, self.sequence_mesh)

    def combine(self, v_uncond: Tensor, v_cond: Tensor, guidance: float) -> Tensor:
        """How the family's pipeline mixes the two velocities."""
        return v_uncond + guidance * (v_cond - v_uncond)

    def load_transformer(
        self,
        path: Path | None = None,
        build: ParameterBuilder | None = None,
        adapter: Path | None = None,
        quantize: QuantizedAs | None = None,
    ) -> nn.Module:
        """The denoising network, of another checkpoint when `path` is given, in `dtype`.

        Args:
            path: a folder, or a single file that `check_same_weights` accepts.
            build: what of each parameter is kept, and where; default: all, on the CPU.
            adapter: a LoRA to add to the weights.
            quantize: how frozen weights are stored, layer by layer as they are read; `build` keeps them whole.

        Raises:
            UserError: files that lack a weight or have another network's; see `lora.load_adapter`.
        """
        source, build = path or self.path, build or WholeParameters(torch.device("cpu"))
        with about(str(source)):
            config, stored = self._open(source)
            network = self._unfilled(config, stored)
            if adapter is not None:
                stored = lora.merge_stored(stored, self.empty_transformer(), adapter, self.pipeline_class, self.dtype)
            fill(network, stored, build, self.dtype, source, quantizer(network, quantize) if quantize else None)
        set_attention(network, self._attention)
        return network.eval()

    def _open(self, source: Path) -> tuple[dict[str, Any], Stored]:
        """The configuration and the weights of the network at `source`."""
        if source.is_file():
            wanted = self.empty_transformer().state_dict()
            config = self._transformer_config
            return config, open_single_file(source, self.transformer_class, config, wanted)
        folder = network_folder(source)
        return read_config(folder), open_weights(weight_files(folder))

    def _unfilled(self, config: dict[str, Any], stored: Stored) -> nn.Module:
        """A network with parameters on meta, as `from_pretrained` of diffusers makes it: its buffers in their dtypes.

        What modules compute when they are made is left out where a file has it: SD3's table of positions passes through
        several gigabytes of float64.
        """
        network_class, before = diffusers_class(self.transformer_class), torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device("meta"):
                network = network_class.from_config(config)
            if lacks_tables(network, stored):
                with init_empty_weights(include_buffers=False):
                    network = network_class.from_config(config)
        finally:
            torch.set_default_dtype(before)
        return network

    def empty_transformer(self) -> nn.Module:
        """The denoising network without weights, on the meta device."""
        with torch.device("meta"):
            return diffusers_class(self.transformer_class).from_config(self._transformer_config)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, ...] to images [B, 3, H, W] or videos [B, F, 3, H, W], on the CPU, float32 in [0, 1]."""
        vae = self._loaded_vae()
        with torch.no_grad():
            parts = latents.to(self.device, self.dtype).split(self._decoded_at_once or len(latents))
            drawn = torch.cat([self.decode_with(vae, part).cpu() for part in parts])
        drawn = drawn.float().div_(2).add_(0.5).clamp_(0, 1)
        return drawn if self.draws_clips or drawn.ndim == 4 else drawn[:, 0]

    def check_adapter(self, path: Path) -> None:
        """Read the LoRA at `path` and hold it against the network, without loading that.

        Raises:
            UserError: it is no LoRA of this network; see `lora.load_adapter`.
        """
        lora.load_adapter(self.empty_transformer(), "checked", path, self.pipeline_class)

    def check_same_weights(self, path: Path) -> None:
        """Hold the checkpoint at `path` against the network by names and shapes, from the headers of its files.

        Raises:
            UserError: other weights than the network's, or files that are no whole safetensors files.
        """
        wanted = {key: tuple(value.shape) for key, value in self.empty_transformer().state_dict().items()}
        if path.is_file():
            found = shapes_of(open_single_file(path, self.transformer_class, self._transformer_config, wanted))
        else:
            found = read_shapes(weight_files(network_folder(path)))
        refuse_other_shapes(found, wanted, "the base")

    def check_compatible(self, path: Path) -> None:
        """Raise UserError when the checkpoint at `path` has another scheduler, architecture or latent space, or not the
        weights that its own configuration asks for.

        A single file says nothing about itself, so it must have the very weights of the network.
        """
        if path.is_file():
            self.check_same_weights(path)
            return
        folder = network_folder(path)
        transformer = f"{folder.relative_to(path) / 'config.json'}"
        checks = [
            (transformer, ("_class_name", *self.transformer_keys), self._transformer_config),
            ("scheduler/scheduler_config.json", SCHEDULER_KEYS, self._scheduler_config),
            ("vae/config.json", self.vae_keys, self._vae_config),
        ]
        for file, keys, ours in checks:
            if not (path / file).is_file():
                continue
            theirs = read_config((path / file).parent, (path / file).name)
            for key in keys:
                if theirs.get(key) != ours.get(key):
                    raise UserError(
                        f"{file} has {key} = {shown(theirs.get(key))}, the student has {shown(ours.get(key))}; "
                        "teacher and student must share scheduler, network interface and latent space"
                    )
        check_own_weights(diffusers_class(self.transformer_class), folder, transformer)

    def save_full(self, transformer_state: dict[str, Tensor], folder: Path) -> None:
        """The student's network beside copies of the base folder's other parts: a diffusers pipeline of its own."""
        shutil.copytree(self.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        transformer = diffusers_class(self.transformer_class).from_config(self._transformer_config)
        transformer.load_state_dict(transformer_state)
        transformer.to(self.dtype).save_pretrained(folder / "transformer")
        apply_umask(*(file for file in folder.rglob("*") if file.is_file()))  # copies keep the mode of the base's

    def save_lora(self, adapter_state: dict[str, Tensor], lora_config: Any, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` that the pipeline's `load_lora_weights` reads."""
        diffusers_class(self.pipeline_class).save_lora_weights(
            folder,
            transformer_lora_layers=adapter_state,
            transformer_lora_adapter_metadata=lora_config.to_dict(),
        )
        apply_umask(folder / lora.DIFFUSERS_WEIGHTS)

    @property
    def _vae_factor(self) -> int:
        """Pixels per latent along a side, where the VAE halves an image between its blocks."""
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1)

    def _evenly_then_shifted(self, steps: int, mu: float) -> Tensor:
        """The grid of pipelines that give the scheduler even sigmas from 1 to 1/steps, which it shifts by `mu`."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas.to(torch.float64)

    def _linear_mu(self, tokens: int) -> float:
        """The `mu` of pipelines in which it grows linearly with the image's tokens; read by dynamic shifting only."""
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return privates.linear_shift()(tokens, *(self._scheduler_config.get(*default) for default in defaults.items()))

    def _check_size(self, key: str = "model.height x model.width", hint: str = "") -> None:
        unit = self.size_unit
        if self.height % unit or self.width % unit:
            raise UserError(
                f"{key} = {self.height}x{self.width}: both must be multiples of {unit} (VAE factor times patch size)"
                f"{hint}"
            )

    def _read_config(self, file: str) -> dict[str, Any]:
        if not (self.path / file).is_file():
            raise UserError(
                f"model.path = {self.path}: no {file}; expected a diffusers folder in {self.pipeline_class} layout"
            )
        with about(f"model.path = {self.path}"):
            return read_config((self.path / file).parent, (self.path / file).name)
