"""What a reward is, what it needs, and how it says that something is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from opd_ds.errors import UserError
from opd_ds.rewards.weights import Weights, WeightsMissingError

if TYPE_CHECKING:  # the `opd-ds` command imports this package, and should answer before torch has been read from disk
    import torch

Metadata = Sequence[dict[str, Any]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Needs:
    """What has to be on the machine, told without importing it.

    Attributes:
        packages: import names beyond the core install.
        extra: the extra of opd-ds that installs them.
        weights: published files; a reward may offer alternatives by its own options.
        install: what `pip install` is given where no extra installs them and import names are not pip's names.
    """

    packages: tuple[str, ...] = ()
    extra: str | None = None
    weights: tuple[Weights, ...] = ()
    install: str | None = None

    def absent_packages(self) -> list[str]:
        return [name for name in self.packages if find_spec(name) is None]

    def requirements(self) -> str:
        """What `pip install` is given."""
        return f"'opd-ds[{self.extra}]'" if self.extra else self.install or " ".join(self.packages)


@dataclass(frozen=True)
class Takes:
    """What a reward has to be given, told without building it.

    Attributes:
        clips: in place of images.
        references: reference pictures beside them.
        columns: metadata of every prompt.
    """

    clips: bool = False
    references: bool = False
    columns: tuple[str, ...] = ()


SERVER = Needs(packages=("fastapi", "uvicorn"), extra="serve")  # what `server.py` imports


class Reward(Protocol):
    """Scores images. Modules that hold one import torch and Pillow at the top and everything heavier inside.

    One with an attribute `takes_clips` that is true scores videos as a whole: its `score` gets `Clip`s (`clips.py`) in
    place of images, and it cannot be asked about images. All others score a video's frames.

    One with an attribute `takes_references` that is true gets the prompts' reference pictures as a fourth argument of
    `score`: for each image a tuple of RGB images, empty where its prompt has none (`references.py`).

    A constructor takes `device` (where its network runs) and whatever else the reward offers as options; it loads the
    weights, strictly, so that what is missing or wrong is found at start-up.
    """

    name: str
    needs: ClassVar[Needs]

    def score(self, images: list[Any], prompts: list[str], metadata: Metadata | None = None) -> torch.Tensor:
        """One float32 score per image, [B], on the CPU. An item that cannot be scored is NaN, never 0."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as plain data for the run's log: engine, weight hashes, preprocessing."""
        ...


class Served:
    """A reward that a server computes: to build it is to ask the server, and loads nothing here."""

    @classmethod
    def rehearse(cls, options: Mapping[str, Any]) -> None:
        """Raise what the constructor raises."""
        cls(**options)


class RewardUnavailableError(UserError):
    """The reward's packages are not installed; the message is the one line that installs them."""


def require(name: str, needs: Needs) -> None:
    """Check packages, then weights, importing and downloading nothing.

    Raises:
        RewardUnavailableError: packages are absent.
        WeightsMissingError: a published file is not where it is looked for.
    """
    for problem in missing(name, needs):
        raise problem


def require_packages(name: str, needs: Needs) -> None:
    """Raise RewardUnavailableError when a package that the reward imports is absent."""
    require(name, replace(needs, weights=()))


def missing(name: str, needs: Needs) -> list[UserError]:
    """What `require` would raise, one after the other: for the packages that are absent, and for each weights file."""
    problems: list[UserError] = []
    absent = needs.absent_packages()
    if absent:
        line = f"reward {name!r} needs {', '.join(absent)}: pip install {needs.requirements()}"
        problems.append(RewardUnavailableError(line))
    for weights in needs.weights:
        if weights.find() is None:
            problems.append(WeightsMissingError(f"reward {name!r}: {weights.missing()}"))
    return problems


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
