"""Tiny random pipelines, one module a model family, for tests and `opd-ds bench families`; made without network.

Each module has two functions:

    write(folder, seed=0) -> Path
        a complete diffusers folder; another seed gives other weights in the same architecture
    draw(pipeline, family, prompts, noise, guidance, steps) -> Tensor
        what diffusers' own pipeline makes of `noise`: final latents, both in the layout of the family's latents

No parameter of the denoising network is left at zero (`randomize`): some layers start there, and a network that answers
nearly 0 to everything would test nothing.
"""

from __future__ import annotations

from torch import nn

PROMPTS = ["a red 3 on blue", "a green 7 on white", "a blue 0 on red", "the number 5", "a neat 8"]


def randomize(network: nn.Module, std: float = 0.08) -> None:
    """Normal weights everywhere, in place; from torch's global generator."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)


__all__ = ["PROMPTS", "randomize"]
