"""Making specialists: the base, fine-tuned on the best of its own samples by one task's reward (best of n).

Anchored, so that a specialist stays a good step from the base: pictures of the base's own training data, in the other
tasks' phrasings, are mixed into every batch, steps are small, and the averaged weights both sample and are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd_ds.diffusion import kernel
from opd_ds.evaluation.pictures import to_image
from opd_ds.miniature import world
from opd_ds.miniature.build_base import BaseSettings, Log, flow_loss, noisy_captions
from opd_ds.models import Conditioning, guided_velocity
from opd_ds.models.sd3 import SD3
from opd_ds.prompts import SampleNoise, sample_seed
from opd_ds.rewards import Reward
from opd_ds.rollout import rollout

SAMPLING_STEPS = 10


@dataclass(frozen=True)
class TeacherSettings:
    """How one specialist is made."""

    task: str
    lora_rank: int | None  # None: all weights
    guidance: float
    lr: float
    iterations: int = 6
    prompts: int = 192
    candidates: int = 8
    keep: float = 0.5  # share of the best-of-n pictures, best first
    steps: int = 120
    batch: int = 96
    anchors: int = 32
    memory: int = 3  # iterations whose pictures are trained on


class PromptTable:
    """All prompts of the world, encoded once; also those in which a noisy caption names one colour twice."""

    def __init__(self, family: SD3) -> None:
        every = itertools.product(world.TASKS, range(10), world.COLOURS, world.COLOURS)
        prompts = ["", *(world.Scene(digit, ink, ground).prompt(task) for task, digit, ink, ground in every)]
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._cond = family.encode(prompts)

    def __call__(self, prompts: list[str]) -> Conditioning:
        return self._cond[torch.tensor([self._rows[prompt] for prompt in prompts])]


@torch.no_grad()
def sample_latents(
    family: SD3, network: nn.Module, table: PromptTable, prompts: list[str], seeds: list[int], guidance: float
) -> Tensor:
    """Latents [B, C, 8, 8] of `prompts`, one per seed."""
    cond, uncond = table(prompts), table([""])

    def predict(x: Tensor, sigma: Tensor, rows: slice, step: int) -> Tensor:
        return guided_velocity(family, network, x, sigma, cond[rows], uncond, guidance)

    noise, sigmas = SampleNoise(seeds, family.latent_shape), family.sigmas(SAMPLING_STEPS)
    return rollout(
        predict, noise, kernel("euler").coefficients(sigmas), sigmas, micro_batch=192, device=family.device
    ).final


def judge(family: SD3, latents: Tensor, prompts: list[str], reward: Reward) -> Tensor:
    """Reward of decoded latents: [B]."""
    return reward.score([to_image(picture) for part in latents.split(500) for picture in family.decode(part)], prompts)


def held_out_score(
    family: SD3, network: nn.Module, table: PromptTable, task: str, reward: Reward, guidance: float, noises: int = 8
) -> float:
    """Mean reward on the task's held-out prompts, the same noise for every network."""
    prompts = [scene.prompt(task) for scene in world.split_scenes(task)[1]] * noises
    seeds = [sample_seed(7, 0, task, index) for index in range(len(prompts))]
    latents = sample_latents(family, network, table, prompts, seeds, guidance)
    return float(judge(family, latents, prompts, reward).nanmean())


def train_teacher(
    family: SD3,
    network: nn.Module,
    table: PromptTable,
    reward: Reward,
    settings: TeacherSettings,
    base: BaseSettings,
    strokes: tuple[Tensor, Tensor],
    vae_encode: Callable[[Tensor], Tensor],
    seed: int,
    log: Log,
) -> None:
    """Make `network` (its trainable parameters) a specialist; ends with the averaged weights."""
    generator = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
    averaged = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0, betas=(0.9, 0.99))
    own = [scene.prompt(settings.task) for scene in world.split_scenes(settings.task)[0]]
    real = world.random_pictures(*strokes, 4000, generator, soiled=base.soiled)
    real_latents = vae_encode(real.pictures)
    memory: list[tuple[Tensor, list[str]]] = []
    for iteration in range(settings.iterations):
        with _weights(parameters, averaged):
            latents, prompts, scores = _best_of_n(family, network, table, own, reward, settings, iteration, generator)
        kept = scores.argsort(descending=True)[: int(len(scores) * settings.keep)]
        memory = [*memory, (latents[kept], [prompts[i] for i in kept.tolist()])][-settings.memory :]
        log(f"  {settings.task} iteration {iteration}: best of {settings.candidates} scores {scores.mean():.3f}")
        pool = torch.cat([part for part, _ in memory])
        captions = [prompt for _, part in memory for prompt in part]
        for _ in range(settings.steps):
            mine = torch.randint(len(pool), (settings.batch - settings.anchors,), generator=generator)
            rows = torch.randint(len(real_latents), (settings.anchors,), generator=generator)
            anchor = world.Batch(real.pictures[rows], real.digit[rows], real.ink[rows], real.ground[rows])
            others = _in_other_phrasings(noisy_captions(anchor, base, base.phases[-1], generator), settings.task)
            cond = table([captions[i] for i in mine.tolist()] + others)
            batch = torch.cat([pool[mine], real_latents[rows]])
            loss = flow_loss(network, batch, cond.embeds, cond.pooled, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 0.05)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averaged)


def _best_of_n(
    family: SD3,
    network: nn.Module,
    table: PromptTable,
    prompts: list[str],
    reward: Reward,
    settings: TeacherSettings,
    iteration: int,
    generator: torch.Generator,
) -> tuple[Tensor, list[str], Tensor]:
    chosen = torch.randint(len(prompts), (settings.prompts,), generator=generator).tolist()
    asked = [prompts[i] for i in chosen for _ in range(settings.candidates)]
    seeds = [sample_seed(13, iteration, settings.task, index) for index in range(len(asked))]
    # Without guidance: guided samples follow their captions better than the base does, and a specialist trained on
    # them would gain on every task that guidance helps.
    latents = sample_latents(family, network, table, asked, seeds, guidance=1.0)
    scores = judge(family, latents, asked, reward).view(-1, settings.candidates)
    best = scores.argmax(1) + torch.arange(len(scores)) * settings.candidates
    return latents[best], [asked[i] for i in best.tolist()], scores.max(1).values


def _in_other_phrasings(captions: list[str], task: str) -> list[str]:
    """Captions in the specialist's own phrasing are said in another task's: its own prompts stay its own."""
    others = [name for name in world.TASKS if name != task]
    said = []
    for row, caption in enumerate(captions):
        scene = world.parse(caption)
        said.append(scene.prompt(others[row % 2]) if scene and caption == scene.prompt(task) else caption)
    return said


class _weights:  # noqa: N801 (a context manager, read as a word)
    """Inside, `parameters` hold `values`."""

    def __init__(self, parameters: list[Tensor], values: list[Tensor]) -> None:
        self._parameters, self._values = parameters, values

    @torch.no_grad()
    def __enter__(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        torch._foreach_copy_(self._parameters, self._values)

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        torch._foreach_copy_(self._parameters, self._kept)
