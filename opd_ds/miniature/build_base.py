"""Training the miniature's VAE and its base model.

The base is mediocre on purpose, in the way web-trained models are: its captions often name a wrong digit or colour,
and many of its images are soiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd_ds.miniature import world

Log = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """One cycle of the learning rate. `*_truth`: the share of captions that name the shown digit or colour on purpose
    (the others name a random one)."""

    steps: int
    lr: float
    digit_truth: float
    colour_truth: float


@dataclass(frozen=True)
class BaseSettings:
    """How VAE and base are trained: first on captions that are mostly wrong, then with true digits, until
    about half of its digits are readable; the colours of captions stay doubtful throughout."""

    vae_steps: int = 1200
    phases: tuple[Phase, ...] = (Phase(2600, 1.5e-3, 0.45, 0.36), *(Phase(800, 1.2e-3, 1.0, 0.4),) * 3)
    batch: int = 128
    pool: int = 12000
    soiled: float = 0.6
    caption_dropout: float = 0.1


def train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int, seed: int, log: Log) -> None:
    """Fit the autoencoder to `pictures` [N, 3, 16, 16] in [0, 1], then set its latents to zero mean, unit deviation."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        target = pictures[torch.randint(len(pictures), (64,), generator=generator)] * 2 - 1
        posterior = vae.encode(target).latent_dist
        latent = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        loss = F.mse_loss(vae.decode(latent).sample, target) + 1e-4 * posterior.kl().mean() / latent[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 300 == 0 or step == steps - 1:
            log(f"  vae step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        latents = vae.encode(pictures[:1000] * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Normalised latents [N, C, 8, 8] of images [N, 3, 16, 16] in [0, 1]."""
    parts = [vae.encode(part * 2 - 1).latent_dist.mean for part in pictures.split(500)]
    return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor


def told(truth: Tensor, share: float, kinds: int, generator: torch.Generator) -> list[int]:
    """What captions say of `truth` [N]: a random one of `kinds` where it is not among the `share` that are right."""
    lie = torch.rand(len(truth), generator=generator) > share
    return torch.where(lie, torch.randint(kinds, (len(truth),), generator=generator), truth).tolist()


def noisy_captions(batch: world.Batch, settings: BaseSettings, phase: Phase, generator: torch.Generator) -> list[str]:
    """A caption for every image, in a random task's phrasing, often wrong and sometimes empty."""
    count, names = len(batch.digit), list(world.COLOURS)
    digits = told(batch.digit, phase.digit_truth, 10, generator)
    inks = told(batch.ink, phase.colour_truth, len(names), generator)
    grounds = told(batch.ground, phase.colour_truth, len(names), generator)
    tasks = torch.randint(len(world.TASKS), (count,), generator=generator).tolist()
    empty = (torch.rand(count, generator=generator) < settings.caption_dropout).tolist()
    rows = zip(digits, inks, grounds, tasks, empty, strict=True)
    return ["" if e else world.Scene(d, names[i], names[g]).prompt(world.TASKS[t]) for d, i, g, t, e in rows]


def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token states [B, L, D] and pooled states [B, P], with gradients."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=pipeline.tokenizer_max_length
    )
    return embeds, pooled


def flow_loss(velocity: Callable[[Tensor, Tensor], Tensor], latents: Tensor, generator: torch.Generator) -> Tensor:
    """Flow-matching loss at sigmas spread as an inference grid with shift 3 spreads them.

    Args:
        velocity: of noisy latents [B, C, h, w] at sigma [B].
    """
    uniform = torch.rand(len(latents), generator=generator)
    sigma = 3 * uniform / (1 + 2 * uniform)
    share = sigma[:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    return F.mse_loss(velocity((1 - share) * latents + share * noise, sigma), noise - latents)


def fit(parameters: list[Tensor], phases: Sequence[Phase], loss_of: Callable[[Phase], Tensor], log: Log) -> None:
    """Minimise the loss of a random batch over all phases; ends with averaged weights."""
    averaged = [parameter.detach().clone() for parameter in parameters]
    for number, phase in enumerate(phases):
        optimizer = torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=1e-2, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.lr, total_steps=phase.steps, pct_start=0.05)
        for step in range(phase.steps):
            loss = loss_of(phase)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 0.005 if step > phase.steps // 4 else 0.05)
            if step % 200 == 0 or step == phase.steps - 1:
                log(f"  base phase {number}, step {step}: loss {loss.item():.4f}")
        with torch.no_grad():
            torch._foreach_copy_(parameters, averaged)


def train_base(
    pipeline: StableDiffusion3Pipeline, strokes: tuple[Tensor, Tensor], settings: BaseSettings, seed: int, log: Log
) -> None:
    """Train transformer and text encoders together; ends with their averaged weights."""
    generator = torch.Generator().manual_seed(seed)
    pool = world.random_pictures(*strokes, settings.pool, generator, soiled=settings.soiled)
    latents = encode_pictures(pipeline.vae, pool.pictures)
    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]

    def loss_of(phase: Phase) -> Tensor:
        rows = torch.randint(len(latents), (settings.batch,), generator=generator)
        embeds, pooled = encode_prompts(pipeline, noisy_captions(pool.rows(rows), settings, phase, generator))

        def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
            return pipeline.transformer(
                hidden_states=noisy,
                timestep=sigma * 1000,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]

        return flow_loss(velocity, latents[rows], generator)

    fit([parameter for module in modules for parameter in module.parameters()], settings.phases, loss_of, log)


def round_to_half(file: Path) -> None:
    """Half the size; diffusers loads the weights as float32."""
    save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})
