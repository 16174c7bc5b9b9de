"""What of a round can be in one forward: samples of one task, one image size and one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_ds.config.schema import RunConfig
from opd_ds.data import Kind, Shard, Size
from opd_ds.diffusion import Coefficients, kernel
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.models import Conditioning, ModelFamily
from opd_ds.training.stages import stage_counts
from opd_ds.utils.pictures import Picture
from opd_ds.utils.transfer import to_device


class Share(NamedTuple):
    """Samples of a task that are of one kind on each rank and are trained in one of the round's updates. A task's loss
    in an update is the mean over its pairs of all kinds.

    Attributes:
        kinds: on each rank; the forwards of a share are made by all ranks together.
        size: of this rank's images.
    """

    task: str
    kinds: tuple[Kind, ...]
    size: Size
    update: int = 0


def by_task(shares: Iterable[Share]) -> dict[str, list[Share]]:
    """Each task's shares, in order."""
    found: dict[str, list[Share]] = {}
    for share in shares:
        found.setdefault(share.task, []).append(share)
    return found


@dataclass(frozen=True)
class Sampler:
    """The run's sampler at one image size.

    Attributes:
        latent_shape: of a sample.
        sigmas, device_sigmas: [T+1], float64 on the host, float32 on the device.
        coefficients: the kernel's on these.
        stages: which network is asked at each step, see `ModelFamily.stages`.
    """

    latent_shape: tuple[int, ...]
    sigmas: Tensor
    device_sigmas: Tensor
    coefficients: Coefficients
    stages: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig, family: ModelFamily, device: torch.device) -> Sampler:
        """`family`: at the size."""
        sigmas = family.sigmas(config.rollout.steps)
        table = kernel(config.rollout.kernel, config.rollout.noise_level).coefficients(sigmas)
        stages = family.stages(sigmas[:-1])
        return cls(family.latent_shape, sigmas, to_device(sigmas.float(), device), table, stages)


@dataclass(frozen=True)
class TaskBatch:
    """The samples of a `Share` of a round on this rank: prompts and noise.

    Attributes:
        parts: of each rank.
        pictures: reference pictures of each prompt.
        trained: int64 [N, K] on the host, the trained steps of all the task's samples of the round, ascending.
        updates: optimizer steps that share the task's samples between them.
    """

    part: Shard
    parts: list[Shard]
    prompts: list[str]
    metadata: list[dict[str, Any]]
    pictures: list[tuple[Picture, ...]]
    cond: Conditioning
    noise: SampleNoise
    trained: Tensor
    updates: int

    @property
    def chosen(self) -> Tensor:
        """The trained steps of this rank's samples: int64 [B, K]."""
        return self.trained[self.part.indices]

    def last_steps(self) -> list[list[int]]:
        """The last trained step of each sample, by rank."""
        return [trained[:, -1].tolist() for trained in self._by_rank()]

    def stage_counts(self, stages: tuple[int, ...]) -> tuple[int, ...]:
        """How many pairs each of two networks has on the rank with most of them."""
        return stage_counts(self._by_rank(), stages)

    def _by_rank(self) -> list[Tensor]:
        """The trained steps of each rank's samples."""
        return [self.trained[part.indices] for part in self.parts]

    @property
    def pairs(self) -> int:
        """(sample, step) pairs of the task in an optimizer step: of all kinds, over all ranks."""
        return self.part.total // self.updates * self.trained.shape[1]
