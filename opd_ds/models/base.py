"""What a model family is: everything around the denoising network, on one diffusers folder.

A family is one file with a class that fills in `ModelFamily`. What families share (reading the folder, loading,
guidance, offloaded text encoders, saving) is here.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import pad

from opd_ds.errors import UserError, about, shown
from opd_ds.models import lora, privates
from opd_ds.models.host_weights import HostMemory, HostWeights
from opd_ds.models.inspection import network_folder, read_config, weight_files
from opd_ds.models.libraries import load
from opd_ds.models.own_weights import check_own_weights
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

ENCODED_AT_ONCE = 8  # prompts


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: named tensors with one row per prompt, as the family's network takes them.

    Where prompts differ in length, `tensors` has a boolean `mask` [B, L]; tensors as long as it are padded with zeros.

    Args:
        known_lengths: `lengths`, where they are known; otherwise the mask is read, for which the device is waited for.

    Attributes:
        lengths: tokens of each prompt, by the mask, on the host: forwards need them. Empty where there is no mask.
    """

    tensors: dict[str, Tensor]
    known_lengths: InitVar[tuple[int, ...] | None] = None
    lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self, known_lengths: tuple[int, ...] | None) -> None:
        if known_lengths is None:
            mask = self.tensors.get("mask")
            known_lengths = () if mask is None else tuple(mask.sum(1).tolist())
        object.__setattr__(self, "lengths", known_lengths)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()}, self.lengths[rows])

    def select(self, index: Tensor, rows: Sequence[int]) -> Conditioning:
        """The rows `index` int64 [b], on the device of the tensors, and the same numbers on the host."""
        lengths = tuple(self.lengths[row] for row in rows) if self.lengths else ()
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()}, lengths)

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.lengths)

    def expand(self, count: int) -> Conditioning:
        """A single encoded prompt repeated `count` times, without copying."""
        expanded = {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        return Conditioning(expanded, self.lengths * count)

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """All rows in order; where the parts are of different lengths, padded to the longest."""
        joined = {name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return Conditioning(joined, tuple(length for part in parts for length in part.lengths))


def _cat(parts: list[Tensor]) -> Tensor:
    if parts[0].ndim > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts]
    return torch.cat(parts)


class ModelFamily(ABC):
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
        text_encoders: `resident` keeps them on the device, `offload` brings them there only to encode.
        decode_micro_batch: images that the VAE decodes at once; None: all that it is given.

    Raises:
        UserError: a folder of another layout, or a size that the network cannot draw.
    """

    pipeline_class: ClassVar[str]  # names of diffusers classes
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str] = "AutoencoderKL"
    transformer_keys: ClassVar[tuple[str, ...]]  # config entries that teacher and student must share
    vae_keys: ClassVar[tuple[str, ...]] = ("latent_channels", "scaling_factor", "shift_factor", "block_out_channels")
    lora_targets: ClassVar[tuple[str, ...]]  # where a LoRA student adapts, unless the run config says it
    default_text_length: ClassVar[int] = 512  # tokens, as the pipeline's own default
    example: ClassVar[str]  # a hub id
    default_frames: ClassVar[int | None] = None  # of a video; None: the family draws images
    embedded_guidance: ClassVar[bool] = False  # the network takes the guidance scale as an input: always one pass
    # Under guidance two calls instead of one of twice the rows: in one call the lengths of prompt and negative prompt
    # differ, and with the mask that this takes attention leaves its fastest kernels.
    guides_in_two_calls: ClassVar[bool] = False
    pipeline_parts: ClassVar[Mapping[str, None]] = {"transformer": None, "vae": None}  # not needed to encode prompts

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
        text_encoders: Literal["resident", "offload"] = "offload",
        decode_micro_batch: int | None = None,
    ) -> None:
        self.path, self.dtype, self.device = path, dtype, device
        self.max_text_length = max_text_length or self.default_text_length
        self._keep_encoders = text_encoders == "resident"
        self._decoded_at_once = decode_micro_batch
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
        self._check_size()
        self.encoded: Callable[[list[str]], Conditioning] | None = None  # asked instead of the text encoders
        self.host_memory: HostMemory | None = None  # where offloaded encoders stand; default: this process's own
        self._encoders: Any = None
        self._encoder_weights: HostWeights | None = None
        self._vae: Any = None
        self._vae_lock = Lock()  # images are also decoded beside the training

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
    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """Encode prompts with a pipeline that has text encoders only, on `self.device`."""

    @abstractmethod
    def velocity(self, transformer: Callable[..., Any], latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """One pass: latents [B, C, ...], sigma [B] float32 to velocity [B, C, ...] in the model's dtype."""

    def decode_with(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B, C, ...] to what the VAE draws, [B, 3, H, W] in [-1, 1]; of a video its middle frame."""
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

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
    ) -> Tensor:
        """Velocity with classifier-free guidance; a guidance of 1 costs one pass.

        Both passes are one batch, or (`guides_in_two_calls`) two. The order in a batch (uncond, cond) and the
        model-dtype arithmetic are those of diffusers' pipelines, so rollout, scoring, training and a user's later
        inference take the same numeric path.

        Args:
            latents: [B, C, ...], any float dtype.
            sigma: [B], float32.
            cond: B encoded prompts.
            uncond: one encoded negative prompt.

        Raises:
            UserError: see `check_guidance`.
        """
        self.check_guidance("guidance", guidance)
        if guidance == 1.0:
            return self.velocity(transformer, latents, sigma, cond)
        if self.guides_in_two_calls:
            v_cond = self.velocity(transformer, latents, sigma, cond)
            v_uncond = self.velocity(transformer, latents, sigma, uncond.expand(len(cond)))
            return self.combine(v_uncond, v_cond, guidance)
        both = Conditioning.cat([uncond.expand(len(cond)), cond])
        velocity = self.velocity(transformer, torch.cat([latents, latents]), sigma.repeat(2), both)
        v_uncond, v_cond = velocity.chunk(2)
        return self.combine(v_uncond, v_cond, guidance)

    def check_guidance(self, key: str, guidance: float) -> None:
        """Raise UserError, naming `key` of the run config, for a guidance that the model does not know."""
        if self.unguided and guidance != 1.0:
            raise UserError(f"{key} = {guidance:g}: {self.path} is distilled to be run without; allowed: 1.0")

    def combine(self, v_uncond: Tensor, v_cond: Tensor, guidance: float) -> Tensor:
        """How the family's pipeline mixes the two velocities."""
        return v_uncond + guidance * (v_cond - v_uncond)

    def load_transformer(
        self, path: Path | None = None, build: ParameterBuilder | None = None, adapter: Path | None = None
    ) -> nn.Module:
        """The denoising network, of another checkpoint when `path` is given, in `dtype`.

        Args:
            path: a folder, or a single file that `check_same_weights` accepts.
            build: what of each parameter is kept, and where; default: all, on the CPU.
            adapter: a LoRA to add to the weights.

        Raises:
            UserError: files that lack a weight or have another network's; see `lora.load_adapter`.
        """
        source, build = path or self.path, build or WholeParameters(torch.device("cpu"))
        with about(str(source)):
            config, stored = self._open(source)
            network = self._unfilled(config, stored)
            if adapter is not None:
                stored = lora.merge_stored(stored, self.empty_transformer(), adapter, self.pipeline_class, self.dtype)
            fill(network, stored, build, self.dtype, source)
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
        network_class, before = _diffusers_class(self.transformer_class), torch.get_default_dtype()
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
            return _diffusers_class(self.transformer_class).from_config(self._transformer_config)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts on the device; encoders leave the device afterwards when configured so. Where `host_memory` is
        of several processes, their first calls are collective.

        Every pass takes equally many prompts: a matrix product of another size may round differently, and a prompt's
        numbers should not depend on how many others are encoded with it.
        """
        if self.encoded is not None:
            return self.encoded(prompts).to(self.device)
        if self._encoders is None:
            self.load_encoders()
        filled = prompts + prompts[-1:] * (-len(prompts) % ENCODED_AT_ONCE)
        blocks = [filled[first : first + ENCODED_AT_ONCE] for first in range(0, len(filled), ENCODED_AT_ONCE)]
        with torch.no_grad(), self._encoder_weights.on_device() if self._encoder_weights else nullcontext():
            cond = Conditioning.cat([self.encode_with(self._encoders, block) for block in blocks])
        return cond[slice(len(prompts))]

    def load_encoders(self) -> None:
        """Read what `encode` needs, which its first call does otherwise.

        Raises:
            UserError: a file is damaged.
        """
        pipeline, what = _diffusers_class(self.pipeline_class), "text encoders or tokenizers"
        self._encoders = load(pipeline, self.path, what, **self.pipeline_parts, dtype=self.dtype)
        if self._keep_encoders:
            self._encoders.to(self.device)
            return
        networks = [part for part in self._encoders.components.values() if isinstance(part, nn.Module)]
        self._encoder_weights = HostWeights(nn.ModuleList(networks), self.device, self.host_memory)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, ...] to images [B, 3, H, W], float32 in [0, 1]; of a video its middle frame."""
        with self._vae_lock:
            if self._vae is None:
                vae = load(_diffusers_class(self.vae_class), self.path, "vae", subfolder="vae", dtype=self.dtype)
                self._vae = vae.requires_grad_(False).eval().to(self.device)
        with torch.no_grad():
            parts = latents.to(self.device, self.dtype).split(self._decoded_at_once or len(latents))
            pictures = torch.cat([self.decode_with(self._vae, part) for part in parts])
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

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
        check_own_weights(_diffusers_class(self.transformer_class), folder, transformer)

    def save_full(self, transformer_state: dict[str, Tensor], folder: Path) -> None:
        """The student's network beside copies of the base folder's other parts: a diffusers pipeline of its own."""
        shutil.copytree(self.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        transformer = _diffusers_class(self.transformer_class).from_config(self._transformer_config)
        transformer.load_state_dict(transformer_state)
        transformer.to(self.dtype).save_pretrained(folder / "transformer")
        apply_umask(*(file for file in folder.rglob("*") if file.is_file()))  # copies keep the mode of the base's

    def save_lora(self, adapter_state: dict[str, Tensor], lora_config: Any, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` that the pipeline's `load_lora_weights` reads."""
        _diffusers_class(self.pipeline_class).save_lora_weights(
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

    def _check_size(self) -> None:
        unit = self.size_unit
        if self.height % unit or self.width % unit:
            raise UserError(
                f"model.height x model.width = {self.height}x{self.width}: both must be multiples of {unit} "
                "(VAE factor times patch size)"
            )

    def _read_config(self, file: str) -> dict[str, Any]:
        if not (self.path / file).is_file():
            raise UserError(
                f"model.path = {self.path}: no {file}; expected a diffusers folder in {self.pipeline_class} layout"
            )
        with about(f"model.path = {self.path}"):
            return read_config((self.path / file).parent, (self.path / file).name)


def _diffusers_class(name: str) -> Any:
    return getattr(diffusers, name)
