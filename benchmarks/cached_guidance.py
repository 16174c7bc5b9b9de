"""`python -m benchmarks cached-guidance`: what `rollout.negative_every` saves, and how wrong its states are.

The miniature's base draws the held-out prompts of its tasks with the recipe's steps. Its negative prompt is asked at
every n-th step; everything else is as with n = 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from opd_ds.config.loading import load_config
from opd_ds.config.paths import resolve_path
from opd_ds.data import PromptSet
from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import Keep, Rows, micro_batches, rollout
from opd_ds.evaluation.pictures import to_image
from opd_ds.models import ModelFamily, guide
from opd_ds.rewards import build
from opd_ds.testing import family_checks as checks
from opd_ds.training.kept_directions import KeptDirections
from opd_ds.utils.markdown import markdown_table

GUIDANCES, EVERY = (2.0, 4.5), (1, 2, 3, 5)
_TOGETHER = 60  # trajectories of a forward


@dataclass(frozen=True)
class Cached:
    """One guidance scale and `every`.

    Attributes:
        passes: of the network in a rollout.
        states: distance of the visited states to those of every = 1, in parts of how far guidance itself moves them.
        final: the same of the final latents.
        rewards: mean by task, and the standard error of its mean.
    """

    guidance: float
    every: int
    passes: int
    states: float
    final: float
    rewards: dict[str, tuple[float, float]]


def bench(folder: Path, say: Callable[[str], None]) -> None:
    """cached_guidance.json and cached_guidance.md."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(measure())
    text = as_markdown(found)
    (folder / "cached_guidance.json").write_text(
        json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8"
    )
    (folder / "cached_guidance.md").write_text(text, encoding="utf-8")
    say(text)


@torch.no_grad()
def measure() -> Iterator[Cached]:
    """By guidance, then by `every`."""
    config = load_config("miniature", None, [])
    base = resolve_path(config.model.path, "model.path")
    family = checks.build("sd3", base, height=None, width=None, max_text_length=config.model.max_text_length)
    prompts: dict[str, list[str]] = {}
    for name, task in config.tasks.items():
        assert task.eval_prompts is not None
        prompts[name] = list(PromptSet.read(task.eval_prompts, name).prompts)
    asked = [prompt for own in prompts.values() for prompt in own]
    draw = _Drawing(family, asked, config.rollout.steps)
    free = draw.states(1.0, 1)
    for guidance in GUIDANCES:
        exact = draw.states(guidance, 1)
        for every in EVERY:
            states = draw.states(guidance, every)
            pictures, scores, first = [to_image(one) for one in family.decode(states[:, -1])], {}, 0
            for name, own in prompts.items():
                reward = build(config.tasks[name].rewards[0].name)
                part = pictures[first : first + len(own)]
                first += len(own)
                values = reward.score(part, own, [{}] * len(own)).tolist()
                scores[name] = fmean(values), stdev(values) / len(values) ** 0.5
            yield Cached(
                guidance,
                every,
                draw.steps + -(-draw.steps // every),
                _distance(states, exact) / _distance(free, exact),
                _distance(states[:, -1], exact[:, -1]) / _distance(free[:, -1], exact[:, -1]),
                scores,
            )


class _Drawing:
    """The base's own network on some prompts, from the same noise each time."""

    def __init__(self, family: ModelFamily, prompts: list[str], steps: int) -> None:
        self._family, self.steps, self._network = family, steps, family.load_transformer()
        self._cond, self._uncond = checks.encode(family, prompts)
        self._count = len(prompts)

    def states(self, guidance: float, every: int) -> Tensor:
        """Visited states and the final latents: [B, steps + 1, C, H, W]."""
        family, count, sigmas = self._family, self._count, self._family.sigmas(self.steps)
        kept, noise = KeptDirections(every, count), SampleNoise(list(range(count)), family.latent_shape)
        two_passes = family.passes(guidance) > 1

        def predict(x: Tensor, sigma: Tensor, rows: Rows, step: int) -> Tensor:
            cond = self._cond.select(rows.device, rows.host)
            direction = kept.at(step, rows) if every > 1 else None
            found = guide(family, self._network, x, sigma, cond, self._uncond, guidance, direction=direction)
            if two_passes and direction is None:
                kept.put(rows, found)
            return found.velocity

        drawn = rollout(
            predict, noise, kernel("euler").coefficients(sigmas), sigmas,
            micro_batches([self.steps] * count, _TOGETHER), device=family.device,
            keep=Keep(torch.arange(self.steps).expand(count, -1), torch.float32),
        )  # fmt: skip
        assert drawn.states is not None
        return torch.cat([drawn.states, drawn.final.unsqueeze(1)], dim=1)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


def as_markdown(found: list[Cached]) -> str:
    """One row a guidance scale and `every`."""
    tasks = list(found[0].rewards)
    head = ["guidance", "negative_every", "passes a rollout", "states off by", "final latents off by", *tasks]
    rows = [
        [
            f"{one.guidance:g}", f"{one.every}", f"{one.passes}", f"{one.states:.1%}", f"{one.final:.1%}",
            *(f"{mean:.3f} ±{error:.3f}" for mean, error in one.rewards.values()),
        ]
        for one in found
    ]  # fmt: skip
    return markdown_table(head, rows) + "\n"
