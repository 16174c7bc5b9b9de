"""`python -m benchmarks optimizers`: rounds of the miniature under optimizers with less state than AdamW.

In one process at ZeRO stage 0. Every optimizer begins with the same weights, prompts and noise; the states that it then
visits are its own student's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from opd_ds.cluster.world import World
from opd_ds.config.loading import load_config
from opd_ds.engine import Group, init_group, state_bytes
from opd_ds.runs.setup import prepare
from opd_ds.utils.markdown import markdown_table

# The recipe's rate is AdamW's. Adafactor's is relative to the size of the weights, Muon's is of orthogonal matrices.
TRIED = (
    ("AdamW", 4e-3),
    ("AdamW8bit", 4e-3),
    ("Adafactor", 4e-3),
    ("Adafactor", 2e-2),
    ("Muon", 4e-3),
    ("Muon", 2e-2),
)
_LAST = 4  # rounds: each task has its turns in them


@dataclass(frozen=True)
class Measured:
    """Attributes:
    state: bytes of a weight.
    loss: mean over the last rounds.
    apart: between the last weights and AdamW's, over how far AdamW's have moved.
    """

    kind: str
    lr: float
    state: float
    loss: float
    apart: float


def bench(folder: Path, rounds: int, say: Callable[[str], None]) -> None:
    """Measure; optimizers.json and optimizers.md.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Measured] = []
    first = reference = torch.empty(0)
    with init_group(World()) as group:
        for kind, lr in TRIED:
            start, end, state, losses = _train(folder, kind, lr, rounds, group)
            if not found:
                first, reference = start, end
            apart = float((end - reference).norm() / (reference - first).norm())
            found.append(Measured(kind, lr, state, sum(losses[-_LAST:]) / _LAST, apart))
            say(f"{kind}, lr {lr:g}: {found[-1].loss:.4f}")
    (folder / "optimizers.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    (folder / "optimizers.md").write_text(as_markdown(found), encoding="utf-8")
    say(as_markdown(found))


def as_markdown(found: list[Measured]) -> str:
    """One row an optimizer; losses beside the first one's."""
    head = ["`optimizer.type`", "lr", "state, bytes a weight", "loss at the end", "of AdamW's", "weights apart"]
    rows = [
        [
            one.kind,
            f"{one.lr:g}",
            f"{one.state:.2f}",
            f"{one.loss:.4f}",
            f"{one.loss / found[0].loss:.3f}",
            f"{one.apart:.1%}",
        ]
        for one in found
    ]
    return markdown_table(head, rows)


def _train(folder: Path, kind: str, lr: float, rounds: int, group: Group) -> tuple[Tensor, Tensor, float, list[float]]:
    """The trained weights before and after, flat; bytes of state a weight; the losses of the rounds."""
    settings = [
        f"run.output_dir={folder / 'run'}",
        f"run.rounds={rounds}",
        "deepspeed=zero0",
        f"optimizer={{type: {kind}, lr: {lr}}}",
    ]
    parts = prepare(load_config("miniature", None, settings), group)

    def weights() -> Tensor:
        return torch.cat([value.flatten() for value in parts.student.gather_weights(trainable_only=True).values()])

    before = weights()
    losses = [float(parts.trainer.run_round(index).losses.loss) for index in range(rounds)]
    ds_config = {"optimizer": {"type": kind}}
    return before, weights(), state_bytes(ds_config, parts.student.shapes) / before.numel(), losses
