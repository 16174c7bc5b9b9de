"""`python -m benchmarks plan`: what a plan predicts against what processes really take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import plan_worker
from benchmarks.full_size import FullSize
from benchmarks.ranks import run_ranks
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.miniature.networks import Sizes, make_pipeline
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import Devices, parse_devices
from opd_ds.plan.memory import Memory, run_memory
from opd_ds.plan.network import find_model
from opd_ds.utils.markdown import markdown_table

# Large beside what allocators round, small enough for a laptop; and smaller, where many ranks have to fit into it.
_MODELS = {"59M": Sizes(layers=3, heads=12, head_dim=64), "41M": Sizes(layers=3, heads=10, head_dim=64)}
_PROMPTS = ["a red 3 on blue", "a green 7 on white", "a blue 0 on red", "the number 5"]
_MIB = 2**20
_RESULTS = ("device", "predicted", "measured", "error", "phase", "parts", "loading")


@dataclass(frozen=True)
class Case:
    """One configuration."""

    precision: str
    stage: int
    kind: str
    checkpointing: bool
    ranks: int
    teachers: str = "resident"
    gather: str = "auto"
    sizes: str = "59M"

    @property
    def name(self) -> str:
        recompute = "recompute" if self.checkpointing else "keep"
        name = f"{self.precision}-zero{self.stage}-{self.kind}-{recompute}-{self.ranks}"
        return name if self.sizes == "59M" else f"{name}-{self.teachers}-{self.gather}-{self.sizes}"

    @property
    def pairs(self) -> int:
        """(state, step) pairs per rank and micro-batch; beside a LoRA's states activations should count."""
        return 4 if self.kind == "lora" else 1

    def write(self, world: Path) -> None:
        """A random model in float32 and in bfloat16, and prompts."""
        folder = world / self.sizes
        if not (folder / "prompts.txt").is_file():
            pipeline = make_pipeline(_PROMPTS, _MODELS[self.sizes], seed=0)
            pipeline.save_pretrained(folder / "fp32")
            pipeline.to(torch.bfloat16).save_pretrained(folder / "bf16")
            (folder / "prompts.txt").write_text("\n".join(_PROMPTS) + "\n", encoding="utf-8")

    def config(self, world: Path) -> RunConfig:
        """Two micro-batches a round."""
        # Weights in the other dtype are converted as they are read; in the same one they stay in the file's pages.
        folder = world / self.sizes
        base = str(folder / ("bf16" if self.precision == "fp32" else "fp32"))
        teacher = {"path": base, "guidance": 1.0, "placement": self.teachers}
        task = {"teacher": teacher, "prompts": str(folder / "prompts.txt")}
        return parse_config(
            {
                "run": {"rounds": 2, "output_dir": str(world / "run")},
                "model": {"path": base, "height": 32, "width": 32, "max_text_length": 10},
                "precision": self.precision,
                "deepspeed": f"zero{self.stage}",
                "student": {"kind": self.kind, "gradient_checkpointing": self.checkpointing, "lora": {"rank": 8}},
                "rollout": {
                    "samples": self.pairs * self.ranks,
                    "steps": 2 if self.sizes == "59M" else 4,
                    "guidance": 1.0,
                    "micro_batch": self.pairs,
                    "gather": self.gather,
                },
                "train": {"micro_batch": self.pairs},
                "tasks": {"one": task},
            }
        )


CASES = tuple(
    Case(*case)
    for case in (
        ("fp32", 0, "full", False, 1),
        ("fp32", 1, "full", False, 1),
        ("fp32", 2, "full", True, 1),
        ("fp32", 3, "full", False, 1),
        ("bf16", 0, "full", False, 1),
        ("bf16", 1, "full", True, 1),
        ("bf16", 2, "full", False, 1),
        ("bf16", 3, "full", True, 1),
        ("fp32", 2, "lora", False, 1),
        ("fp32", 3, "lora", True, 1),
        ("bf16", 2, "lora", True, 1),
        ("fp32", 2, "full", False, 2),
        ("fp32", 3, "full", True, 2),
        ("bf16", 2, "full", True, 2),
        ("bf16", 3, "lora", False, 2),
    )
)


def at_world_sizes(sizes: Iterable[int]) -> tuple[Case, ...]:
    """The smaller model on so many ranks: everything sharded and gathered layer by layer; ZeRO-2."""
    sharded = [Case("fp32", 3, "full", True, ranks, "zero_inference", "per_layer", "41M") for ranks in sizes]
    plain = [Case("fp32", 2, "full", True, ranks, "resident", "auto", "41M") for ranks in sizes]
    return (*sharded, *plain)


def bench(folder: Path, say: Callable[[str], None], cases: Iterable[Case | FullSize] = CASES) -> None:
    """Measure what is missing in `folder`, then write plan.json and plan.md there.

    Raises:
        UserError: a configuration failed, naming its logs.
    """
    world = folder.resolve() / "world"
    found = []
    for case in cases:
        if torch.cuda.is_available() and case.ranks > torch.cuda.device_count():
            say(f"{case.name}: left out, there are {torch.cuda.device_count()} devices")
            continue
        case.write(world)
        measured = _measure(case, world, folder)
        on_cpu = measured["device"] == "cpu"
        memory = predict(case.config(world), _planned(case, on_cpu=on_cpu))
        peak = max(rank["peak"] for rank in measured["ranks"])
        row = asdict(case) | {
            "device": measured["device"],
            "predicted": memory.peak,
            "measured": peak,
            "error": memory.peak / peak - 1,
            "phase": memory.worst.value,
            "loading": max(rank["loading"] for rank in measured["ranks"]),
            "parts": {part.name: part.nbytes for part in memory.device if part.alive(memory.worst)},
        }
        found.append(row)
        say(
            f"{case.name}: predicted {memory.peak / _MIB:.0f} MiB, measured {peak / _MIB:.0f} MiB ({row['error']:+.1%})"
        )
    (folder / "plan.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "plan.md").write_text(as_markdown(found), encoding="utf-8")
    say(f"table: {folder / 'plan.md'}")


def predict(config: RunConfig, devices: Devices) -> Memory:
    """Of the rounds alone."""
    return run_memory(config, Costs(find_model(config), config), devices, rounds_only=True)


def as_markdown(found: list[dict[str, Any]]) -> str:
    """The table."""
    settings = [key for key in found[0] if key not in _RESULTS] if found else []
    rows = [
        [
            *(_cell(row[key]) for key in settings),
            row["phase"],
            f"{row['predicted'] / _MIB:,.0f}",
            f"{row['measured'] / _MIB:,.0f}",
            f"{row['error']:+.1%}",
        ]
        for row in found
    ]
    head = [*settings, "worst phase", "predicted, MiB", "measured, MiB", "error"]
    return markdown_table(head, rows, text_columns=len(settings) + 1)


def _cell(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _planned(case: Case | FullSize, *, on_cpu: bool) -> Devices:
    return parse_devices(f"{case.ranks}x{'cpu' if on_cpu else 'H100-80GB'}", "--gpus")


def _measure(case: Case | FullSize, world: Path, folder: Path) -> dict[str, Any]:
    """By the worker, one process per rank; a measurement that is there is not repeated."""
    place = folder / case.name
    place.mkdir(parents=True, exist_ok=True)
    out = place / "measured.json"
    if out.is_file():
        return json.loads(out.read_text(encoding="utf-8"))
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump(case.config(world).model_dump(mode="json")), encoding="utf-8")
    arguments = [str(config), str(out), str(case.config(world).run.rounds)]
    run_ranks(plan_worker.__name__, arguments, case.ranks, place, {"OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text(encoding="utf-8"))
