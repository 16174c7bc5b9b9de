"""Two denoising networks for two ranges of sigma, as one module: one engine trains, shards and gathers both. What asks
them says at which stage it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

# As diffusers names their folders: the one for high sigmas first. Their places are what `stage` counts.
PARTS = ("transformer", "transformer_2")

T = TypeVar("T")


class NoiseStages:
    """Which network of a model family is asked at which sigma.

    Attributes:
        networks: their folders; two where one is for high and one for low sigmas.
        boundary: the sigma below which the second is asked; None where there is one.
        low_noise_guidance: that of the second under guidance, where it is another.
    """

    networks: ClassVar[tuple[str, ...]] = PARTS[:1]
    boundary: float | None = None
    low_noise_guidance: float | None = None

    def stages(self, sigmas: Tensor) -> tuple[int, ...]:
        """Which of the networks is asked at each of `sigmas` [T]: 0, or 1 for the second."""
        if self.boundary is None:
            return (0,) * len(sigmas)
        return tuple((sigmas.float() < self.boundary).int().tolist())

    def at_stage(self, transformer: Callable[..., Any], stage: int) -> Callable[..., Any]:
        """What `ModelFamily.velocity` takes: of two networks one."""
        return transformer if self.boundary is None else partial(transformer, stage=stage)

    def guidance_at(self, guidance: float, stage: int) -> float:
        return self.low_noise_guidance if stage and self.low_noise_guidance is not None else guidance


class TwoNetworks(nn.Module):
    """A forward is one of the two networks': every rank must ask for the same one.

    Its parameters are named as the networks name them, after `transformer.` or `transformer_2.`.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2

    def forward(self, *, stage: int, **inputs: Any) -> Any:
        return self.get_submodule(PARTS[stage])(**inputs)

    @property
    def gradient_checkpointing(self) -> bool:
        return bool(self.transformer.gradient_checkpointing)

    def enable_gradient_checkpointing(self, *how: Any) -> None:
        for part in PARTS:
            self.get_submodule(part).enable_gradient_checkpointing(*how)  # type: ignore[operator]

    def set_attention_backend(self, backend: str) -> None:
        for part in PARTS:
            self.get_submodule(part).set_attention_backend(backend)  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        for part in PARTS:
            self.get_submodule(part).disable_gradient_checkpointing()  # type: ignore[operator]


def joined(parts: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What belongs to the networks' parameters, under the names that these have in the module of both."""
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def of_part(values: Mapping[str, T], part: str) -> dict[str, T]:
    """The inverse, for one network."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
