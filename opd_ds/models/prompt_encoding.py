"""What turns prompts and pictures into what a network takes: text encoders and VAE of a diffusers folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from opd_ds.models.conditioning import Conditioning
from opd_ds.models.host_weights import HostMemory, HostWeights
from opd_ds.models.libraries import diffusers_class, load
from opd_ds.utils.pictures import Picture

ENCODED_AT_ONCE = 8  # prompts
REFERENCE = "reference"  # what the latents of a picture are called where encodings are kept


@dataclass
class _Loaded:
    """What has been read so far: a family has it together with its copies at other image sizes (`ModelFamily.at`)."""

    encoders: Any = None
    encoder_weights: HostWeights | None = None
    vae: Any = None
    vae_lock: Lock = field(default_factory=Lock)  # images are also decoded beside the training


class PromptEncoding(ABC):
    """Encoders that are read when they are first needed, and stay on the device or come there only to encode.

    Attributes:
        encoded: asked for what has a name (`text_name`, `picture_name`) instead of text encoders and VAE.
        loaded: encoders and VAE, once they have been read.
        host_memory: where offloaded text encoders stand; default: this process's own.
    """

    pipeline_class: ClassVar[str]  # names of diffusers classes
    vae_class: ClassVar[str] = "AutoencoderKL"
    pipeline_parts: ClassVar[Mapping[str, None]] = {"transformer": None, "vae": None}  # not needed to encode prompts
    takes_pictures: ClassVar[int] = 0  # the most reference pictures of a prompt
    needs_pictures: ClassVar[bool] = False  # there is no prompt without
    fits_pictures_to_image: ClassVar[bool] = False  # they are resized to the size that is drawn
    vae_tiling: bool = False  # the VAE works in tiles
    sees_pictures: ClassVar[bool] = False  # the text encoder reads them together with the prompt

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, *, resident: bool) -> None:
        self.path, self.dtype, self.device = path, dtype, device
        self.encoded: Callable[[list[str]], Conditioning] | None = None
        self.host_memory: HostMemory | None = None
        self._keep_encoders = resident
        self.loaded = _Loaded()

    # ---- what a family says ----

    @abstractmethod
    def encode_with(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """Encode prompts with a pipeline that has text encoders only, on `self.device`."""

    def encode_seen_with(self, pipeline: Any, prompt: str, pictures: list[Image]) -> Conditioning:
        """Where the family `sees_pictures`: one prompt and its pictures, as they are, with a pipeline as above."""
        raise NotImplementedError

    def fitted_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Where it `takes_pictures`: what a picture of `size` is resized to, both (width, height) in pixels."""
        raise NotImplementedError

    def fit(self, picture: Image) -> Image:
        """The picture in its `fitted_size`, as the family's pipeline resizes it."""
        return picture.resize(self.fitted_size(picture.size), Resampling.LANCZOS)

    def encode_picture_with(self, vae: Any, pixels: Tensor) -> Tensor:
        """A fitted picture [1, 3, H, W] in [-1, 1] to its latents [1, C, h, w], as the network takes them."""
        raise NotImplementedError

    def seen_tokens(self, size: tuple[int, int]) -> int:
        """Where it `sees_pictures`: the tokens that a picture of `size` adds to its prompt."""
        return 0

    def flaw_of(self, picture: Picture) -> str:
        """Why the family's pipeline would refuse the picture; empty where it would not."""
        return ""

    def given_parts(self) -> dict[str, Any]:
        """Parts of the pipeline that its class does not read itself to encode prompts."""
        return dict(self.pipeline_parts)

    # ---- what families share ----

    def encode(self, prompts: list[str], pictures: Sequence[tuple[Picture, ...]] = ()) -> Conditioning:
        """Encode prompts on the device; encoders leave the device afterwards when configured so. Where `host_memory` is
        of several processes, their first calls are collective.

        Every pass takes equally many prompts: a matrix product of another size may round differently, and a prompt's
        numbers should not depend on how many others are encoded with it. What is seen with pictures goes one by one.

        Args:
            pictures: the reference pictures of each prompt; empty where none has any.
        """
        cond = self.encode_texts(prompts, pictures)
        if not any(pictures):
            return cond
        return cond.with_references(tuple(tuple(map(self.encode_picture, own)) for own in pictures))

    def encode_texts(self, prompts: list[str], pictures: Sequence[tuple[Picture, ...]] = ()) -> Conditioning:
        """`encode` without the latents of the pictures."""
        if self.sees_pictures and any(pictures):
            return self._encode_seen(prompts, pictures)
        if self.encoded is not None:
            return self.encoded(prompts).to(self.device)
        filled = prompts + prompts[-1:] * (-len(prompts) % ENCODED_AT_ONCE)
        blocks = [filled[first : first + ENCODED_AT_ONCE] for first in range(0, len(filled), ENCODED_AT_ONCE)]
        with self._encoders_at_hand() as pipeline:
            cond = Conditioning.cat([self.encode_with(pipeline, block) for block in blocks])
        return cond[slice(len(prompts))]

    def text_name(self, prompt: str, pictures: tuple[Picture, ...] = ()) -> str:
        """What names the encoding of a prompt: the prompt, and what the text encoder sees beside it."""
        return "\0".join([prompt, *(picture.sha256 for picture in pictures if self.sees_pictures)])

    def picture_name(self, picture: Picture) -> str:
        """What names the latents of a picture; no prompt is called so."""
        width, height = self.fitted_size(picture.size)
        return f"\0{picture.sha256} {width}x{height}"

    def encode_picture(self, picture: Picture) -> Tensor:
        """A reference picture's latents [C, h, w], on the device.

        Raises:
            UserError: the picture is damaged, or not what it was when the prompts were read.
        """
        if self.encoded is not None:
            return self.encoded([self.picture_name(picture)]).tensors[REFERENCE][0].to(self.device)
        vae = self._loaded_vae()
        with torch.no_grad():
            return self.encode_picture_with(vae, as_pixels(self.fit(picture.load())).to(self.device, self.dtype))[0]

    def _encode_seen(self, prompts: list[str], pictures: Sequence[tuple[Picture, ...]]) -> Conditioning:
        rows = list(zip(prompts, pictures, strict=True))
        if self.encoded is not None:
            return self.encoded([self.text_name(*row) for row in rows]).to(self.device)
        with self._encoders_at_hand() as pipeline:
            found = [
                self.encode_seen_with(pipeline, prompt, [picture.load() for picture in own])
                if own
                else self.encode_with(pipeline, [prompt] * ENCODED_AT_ONCE)[slice(1)]
                for prompt, own in rows
            ]
        return Conditioning.cat(found)

    @contextmanager
    def _encoders_at_hand(self) -> Iterator[Any]:
        """The pipeline of the text encoders, which are on the device inside."""
        if self.loaded.encoders is None:
            self.load_encoders()
        weights = self.loaded.encoder_weights
        with torch.no_grad(), weights.on_device() if weights else nullcontext():
            yield self.loaded.encoders

    def load_encoders(self) -> None:
        """Read what `encode` needs, which its first call does otherwise.

        Raises:
            UserError: a file is damaged.
        """
        pipeline, what = diffusers_class(self.pipeline_class), "text encoders or tokenizers"
        self.loaded.encoders = encoders = load(pipeline, self.path, what, **self.given_parts(), dtype=self.dtype)
        if self._keep_encoders:
            encoders.to(self.device)
            return
        networks = [part for part in encoders.components.values() if isinstance(part, nn.Module)]
        self.loaded.encoder_weights = HostWeights(nn.ModuleList(networks), self.device, self.host_memory)

    def load_vae(self) -> None:
        """Read what `decode` needs, which its first call does otherwise.

        In a thread that call would disturb all others: diffusers (0.42) sets torch's default dtype while it reads.

        Raises:
            UserError: a file is damaged.
        """
        self._loaded_vae()

    def _loaded_vae(self) -> Any:
        with self.loaded.vae_lock:
            if self.loaded.vae is None:
                vae = load(diffusers_class(self.vae_class), self.path, "vae", subfolder="vae", dtype=self.dtype)
                self.loaded.vae = vae.requires_grad_(False).eval().to(self.device)
                if self.vae_tiling:
                    vae.enable_tiling()
            return self.loaded.vae


def as_pixels(picture: Image) -> Tensor:
    """[1, 3, H, W] in [-1, 1], float32."""
    return 2 * torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None] - 1
