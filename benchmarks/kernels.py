"""`python -m benchmarks kernels`: what other kernels of attention and compiled blocks change in each family's network.

On tiny networks with random weights, in float32: the velocity of one batch and the gradient of its square by all
weights, and the bytes that are kept for the backward, beside those of the plain network. Times are those of the GPU
command (`--part attention`, `--part compiled`): tiny networks have none worth reading.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.family_trial import Trial, bytes_kept
from opd_ds.errors import UserError
from opd_ds.models import FAMILIES, ModelFamily, compile_blocks
from opd_ds.models.attention import BACKENDS
from opd_ds.testing import family_checks as checks
from opd_ds.utils.markdown import markdown_table

COMPILED = "compiled blocks"


@dataclass(frozen=True)
class Change:
    """Beside the plain network: relative errors, and the part of the bytes kept; `refused` where it cannot be had."""

    family: str
    what: str
    velocity: float = 0.0
    gradient: float = 0.0
    kept: float = 1.0
    refused: str = ""


def bench(folder: Path, names: list[str], say: Callable[[str], None]) -> None:
    """kernels.json and kernels.md.

    Args:
        names: of families; all where there are none.
    """
    shutil.rmtree(folder / "tiny", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Change] = []
    for name in names or FAMILIES:
        trial = Trial(name, (folder / "tiny" / name).resolve())
        trial.write()
        found += changes(trial)
        say(as_markdown([one for one in found if one.family == name]))
    (folder / "kernels.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    (folder / "kernels.md").write_text(as_markdown(found), encoding="utf-8")


def changes(trial: Trial) -> Iterator[Change]:
    """One each for the kernels of attention that this device can have at all, and one for compiled blocks."""
    family = trial.family
    plain = _measure(family, family.load_transformer())
    for backend, kernel in BACKENDS.items():
        if kernel.accelerator_only and family.device.type == "cpu":
            continue
        other = trial.build(family.dtype, attention=backend)
        try:
            other.check_attention()
        except UserError as error:
            yield Change(trial.name, backend, refused=str(error))
            continue
        yield _compare(trial.name, backend, _measure(other, other.load_transformer()), plain)
    network = family.load_transformer()
    torch._dynamo.reset()  # so that no family finds another one's graphs
    compile_blocks(network)
    yield _compare(trial.name, COMPILED, _measure(family, network), plain)


def _measure(family: ModelFamily, network: nn.Module) -> tuple[Tensor, Tensor, int]:
    """The velocity, the gradient, and the bytes kept for it."""
    network.requires_grad_(True).train()
    cond, _ = checks.encode(family, checks.PROMPTS)
    x, sigma = checks.noise(family).draw(slice(None)), torch.tensor([0.5, 0.9, 0.1, 0.3])
    velocity: list[Tensor] = []

    def forward() -> Tensor:
        velocity.append(family.velocity(family.at_stage(network, 0), x, sigma, cond))
        return velocity[-1]

    forward()  # makes graphs and tables
    kept, _ = bytes_kept(network, forward)
    # A weight without effect has no gradient, or zeros where blocks are compiled.
    weights = list(network.parameters())
    given = torch.autograd.grad(velocity[-1].float().square().sum(), weights, allow_unused=True, materialize_grads=True)
    whole = torch.cat([one.flatten().float() for one in given])
    return velocity[-1].detach().float(), whole, kept


def _compare(family: str, what: str, found: tuple[Tensor, Tensor, int], plain: tuple[Tensor, Tensor, int]) -> Change:
    velocity, gradient = (
        float((mine - own).norm() / own.norm()) for mine, own in zip(found[:2], plain[:2], strict=True)
    )
    return Change(family, what, velocity, gradient, found[2] / plain[2])


def as_markdown(found: list[Change]) -> str:
    """One row a family; a dash where it cannot have a kernel."""
    kinds = list(dict.fromkeys(one.what for one in found))
    by_family: dict[str, dict[str, Change]] = {}
    for one in found:
        by_family.setdefault(one.family, {})[one.what] = one
    head = ["", *(f"{kind}: {what}" for kind in kinds for what in ("velocity", "gradient", "kept"))]
    rows = [[name, *(cell for kind in kinds for cell in _cells(row[kind]))] for name, row in by_family.items()]
    return markdown_table(head, rows) + "\n"


def _cells(one: Change) -> tuple[Any, ...]:
    return ("-",) * 3 if one.refused else (f"{one.velocity:.1e}", f"{one.gradient:.1e}", f"{one.kept:.2f}")
