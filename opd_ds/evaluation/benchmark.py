"""Any models on any prompt sets by any rewards: what is missing on disk is drawn and scored, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from opd_ds.config.sections import WEIGHTED_SUM
from opd_ds.data import PromptSet
from opd_ds.engine import Group
from opd_ds.evaluation.evaluator import score_images, with_sum
from opd_ds.evaluation.pictures import Item, Painter, items, references
from opd_ds.evaluation.store import PictureStore, ScoreStore, digest
from opd_ds.rewards import Drawn, Reward, batches
from opd_ds.utils.progress import work

_SCORED_AT_ONCE = 64  # images, or frames of clips

# Model, prompt set, label -> one score per item, NaN where there is none.
Scores = dict[tuple[str, str, str], list[float]]


@dataclass(frozen=True)
class EvalModel:
    """A model to compare.

    Attributes:
        identity: hash of its files; another one means other images.
        guidance: by prompt set.
        open: brings its network up. It may be collective and is called only when images are missing, on all ranks.
    """

    name: str
    identity: str
    guidance: dict[str, float]
    open: Callable[[], AbstractContextManager[Any]]

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-")


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts, and the labels of the rewards asked about them.

    Attributes:
        own: which of `asked` are the set's own, the headline first.
        summed: weights by label of the rewards whose sum is the headline instead.
    """

    prompts: PromptSet
    asked: tuple[str, ...]
    own: tuple[str, ...]
    items: tuple[Item, ...]
    summed: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompts: PromptSet,
        asked: tuple[str, ...],
        own: tuple[str, ...],
        samples: int,
        summed: Mapping[str, float],
        limit: int | None = None,
    ) -> EvaluationSet:
        return cls(prompts, asked, own, tuple(items(prompts, samples, limit)), summed)

    def first(self, count: int) -> list[Item]:
        """The first images of the first `count` prompts."""
        return [item for item in self.items if item.sample == 0 and item.number < count]

    @property
    def headlines(self) -> tuple[str, ...]:
        """The label of the weighted sum, where there is one."""
        return (WEIGHTED_SUM,) if self.summed else ()


@dataclass(frozen=True)
class _Job:
    """One image that a reward has yet to score."""

    label: str
    by: str
    file: Path
    picture: str
    item: Item


class Benchmark:
    """Draws and scores images, and stores both. The folders must be ones that all ranks see.

    Args:
        base_sha256: of the base folder, which gives all models text encoders, VAE and scheduler.
        rewards: by label.
    """

    def __init__(
        self,
        folder: Path,
        group: Group,
        painter: Painter,
        base_sha256: str,
        sets: dict[str, EvaluationSet],
        rewards: dict[str, Reward],
    ) -> None:
        self.sets = sets
        self._group, self._painter, self._rewards = group, painter, rewards
        self._base_sha256 = base_sha256
        self.settings = painter.settings | {"base_sha256": base_sha256}
        self.identities = {label: reward.identity() for label, reward in rewards.items()}
        self.keep_in(folder)

    def keep_in(self, folder: Path, others: Sequence[Path] = ()) -> None:
        """Store in `folder`, and take over what the evaluations in the folders `others` have drawn and scored."""
        self.folder = folder
        self._pictures = PictureStore(folder / "images")
        self._scores = ScoreStore(folder / "scores", self._group.world.rank)
        self._other_pictures = [PictureStore(other / "images") for other in others]
        self._other_scores = [ScoreStore(other / "scores", self._group.world.rank) for other in others]

    # ---- drawing ----

    def missing(self, model: EvalModel) -> dict[str, list[Item]]:
        """Unfinished images by prompt set, as rank 0 sees the folder. Collective."""
        found = None
        if self._group.world.is_main:
            found = {
                name: [place for place, item in enumerate(chosen.items) if not self._finished(model, name, item)]
                for name, chosen in self.sets.items()
            }
        found = self._group.broadcast(found)
        return {name: [self.sets[name].items[place] for place in places] for name, places in found.items() if places}

    def _finished(self, model: EvalModel, name: str, item: Item) -> bool:
        file, recipe = picture_file(model, name, item), self._recipe(model, name, item)
        return self._pictures.finished(file, recipe) or self._pictures.adopt(file, recipe, self._other_pictures)

    def draw(self, model: EvalModel, pause: Callable[[], None] | None = None) -> int:
        """Draw what is missing; every rank makes equally many forwards, so `model` may be sharded. Collective.

        Args:
            pause: called on all ranks before each prompt set. It may end the run: what is drawn stays.

        Returns:
            How many images were drawn.
        """
        missing = self.missing(model)
        if not missing:
            return 0
        count, size = sum(map(len, missing.values())), self._group.world.size
        with model.open() as network, work(f"drawing {model.name}", count, "images") as drawing:
            for name, wanted in missing.items():
                if pause is not None:
                    pause()
                for item, picture, weight in self._painter.draw(network, wanted, model.guidance[name]):
                    drawing.advance(size)  # the other ranks draw as many meanwhile
                    if weight > 0:
                        recipe = self._recipe(model, name, item)
                        self._pictures.write(picture_file(model, name, item), picture, recipe)
        self._group.barrier()
        return count

    def first_pictures(self, model: EvalModel, count: int) -> dict[str, list[Drawn]]:
        """The first image or clip of each of the first `count` prompts, by prompt set; they must be finished."""
        return {
            name: [self._pictures.read(picture_file(model, name, item)) for item in chosen.first(count)]
            for name, chosen in self.sets.items()
        }

    def first_references(self, count: int) -> dict[str, list[Image]]:
        """The first reference picture of each of the first `count` prompts, by prompt set."""
        return {name: references(chosen.first(count)) for name, chosen in self.sets.items()}

    def _recipe(self, model: EvalModel, name: str, item: Item) -> dict[str, Any]:
        drawn_by = {"base_sha256": self._base_sha256, "model": model.identity, "guidance": model.guidance[name]}
        return self._painter.recipe(item) | drawn_by

    # ---- scoring ----

    def score(self, models: list[EvalModel]) -> Scores:
        """Score what has no score yet, each rank its share; everything that is known, on every rank. Collective."""
        jobs = {
            (model.name, name, label): list(self._jobs(model, name, label))
            for model in models
            for name, chosen in self.sets.items()
            for label in chosen.asked
        }
        known = self._group.broadcast(self._known_scores() if self._group.world.is_main else None)
        # One of each: two sets may share a prompt. By label first: a batch goes to one reward.
        found = {_key(job): job for part in jobs.values() for job in part}
        open_jobs = sorted((job for key, job in found.items() if key not in known), key=lambda job: job.label)
        # Every rank some of each reward: one may take a hundred times as long as another.
        self._score(open_jobs[self._group.world.rank :: self._group.world.size])
        self._group.barrier()
        known = self._group.broadcast(self._known_scores() if self._group.world.is_main else None)
        scores = {where: [known.get(_key(job), math.nan) for job in part] for where, part in jobs.items()}
        return scores | {
            (model.name, name, WEIGHTED_SUM): self._sum(scores, model.name, name)
            for model in models
            for name, chosen in self.sets.items()
            if chosen.summed
        }

    def _sum(self, scores: Scores, model: str, name: str) -> list[float]:
        chosen = self.sets[name]
        found = {label: torch.tensor(scores[model, name, label], dtype=torch.float64) for label in chosen.summed}
        return with_sum(found, chosen.summed)[WEIGHTED_SUM].tolist()

    def _known_scores(self) -> dict[tuple[str, str, str], float]:
        return {key: score for store in (*self._other_scores, self._scores) for key, score in store.read().items()}

    def _jobs(self, model: EvalModel, name: str, label: str) -> Iterator[_Job]:
        by = digest(self.identities[label])
        for item in self.sets[name].items:
            asked = {"drawn": self._recipe(model, name, item), "metadata": item.metadata}
            yield _Job(label, by, picture_file(model, name, item), digest(asked), item)

    def _score(self, jobs: list[_Job]) -> None:
        for label in dict.fromkeys(job.label for job in jobs):
            self._score_by(label, [job for job in jobs if job.label == label])

    def _score_by(self, label: str, jobs: list[_Job]) -> None:
        size, at_once = self._group.world.size, max(1, _SCORED_AT_ONCE // self._painter.frames)
        with work(f"scoring by {label}", len(jobs) * size, "images") as scoring:
            for part in batches(jobs, at_once):
                self._group.progress(f"scoring images by {label}")
                pictures = [self._pictures.read(job.file) for job in part]
                scores = score_images(self._rewards[label], label, pictures, [job.item for job in part])
                self._scores.append(
                    {"picture": job.picture, "reward": label, "by": job.by, "score": score, "file": str(job.file)}
                    for job, score in zip(part, scores.tolist(), strict=True)
                )
                scoring.advance(len(part) * size)  # the other ranks score as many meanwhile


def picture_file(model: EvalModel, name: str, item: Item) -> Path:
    """`<model>/<set>/NNNNN-K.png`, below the folder of images."""
    return Path(model.folder, name, f"{item.number:05d}-{item.sample}.png")


def _key(job: _Job) -> tuple[str, str, str]:
    return job.picture, job.label, job.by
