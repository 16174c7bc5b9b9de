"""`python -m benchmarks loading`: what a rank's host holds while networks are loaded under ZeRO-3, beside its share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import loading_worker
from benchmarks.full_size import FullSize
from benchmarks.ranks import run_ranks
from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig

# Each in its true width, with few blocks: 0.3 to 0.6 billion parameters.
MODELS = {"stable-diffusion-3.5-medium": 3, "FLUX.1-dev": 1, "Qwen-Image": 1, "Wan2.1-T2V-14B-Diffusers": 1}
_MIB, _GIB = 2**20, 2**30
# Buckets are a fixed size of DeepSpeed's, plain SGD has no moments: what is measured should be the weights.
_ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "sub_group_size": 20_000_000,
}
_STUDENT = {
    "zero_optimization": _ZERO3,
    "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
    "zero_allow_untested_optimizer": True,
}
_TEACHER = {"zero_optimization": {key: value for key, value in _ZERO3.items() if key != "sub_group_size"}}
# Of the student: bf16 weights, fp32 masters, bf16 gradients; of the teacher: bf16 weights.
_NETWORK, _ALL = 2, 2 + 4 + 2 + 2


@dataclass(frozen=True)
class Case:
    """A full-parameter student and a `zero_inference` teacher of one model on some ranks of this machine."""

    model: str
    layers: int
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.ranks}-ranks"

    @property
    def size(self) -> FullSize:
        return FullSize(self.model, self.layers, "full", "full", stage=3)

    def config(self, world: Path) -> RunConfig:
        data = self.size.config(world).model_dump(mode="json")
        for name, content in (("student", _STUDENT), ("teacher", _TEACHER)):
            (world / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        data["deepspeed"] = str(world / "student.json")
        data["rollout"]["gather"] = "per_layer"
        task, settings = next(iter(data["tasks"].items()))
        settings["teacher"] |= {"placement": "zero_inference", "deepspeed": str(world / "teacher.json")}
        data["tasks"] = {task: settings}
        return parse_config(data)


def bench(folder: Path, say: Callable[[str], None], models: dict[str, int], ranks: list[int]) -> None:
    """Measure what is missing in `folder`, then write loading.json and loading.md there.

    Raises:
        UserError: a case failed, naming its logs.
    """
    world = folder.resolve() / "world"
    found = []
    for model, layers in models.items():
        for count in ranks:
            case = Case(model, layers, count)
            case.size.write(world)
            found.append(_row(case, _measure(case, world, folder), world))
            say(_line(found[-1]))
    (folder / "loading.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "loading.md").write_text(as_markdown(found), encoding="utf-8")
    say(f"table: {folder / 'loading.md'}")


def as_markdown(found: list[dict[str, Any]]) -> str:
    """The table."""
    head = [
        "model", "parameters, M", "ranks", "share of the network", "peak, network", "allowed",
        "share of all", "peak, all", "allowed", "of the file, mapped", "seconds",
    ]  # fmt: skip
    return "\n".join([f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *map(_line, found)]) + "\n"


def _row(case: Case, ranks: list[dict[str, Any]], world: Path) -> dict[str, Any]:
    parameters, buffers = ranks[0]["parameters"], ranks[0]["buffers"]  # of which every rank needs all
    shares = {
        "network": _NETWORK * parameters / case.ranks + buffers,
        "all": _ALL * parameters / case.ranks + 2 * buffers,
    }
    stages = ("network", "engine", "teacher")
    return {
        "model": case.model,
        "ranks": case.ranks,
        "parameters": parameters,
        "share": shares,
        "allowed": {name: 1.25 * share + _GIB for name, share in shares.items()},
        "peak": {
            "network": max(rank["network"] for rank in ranks),
            "all": max(rank[stage] for rank in ranks for stage in stages),
        },
        "mapped": sum(rank["mapped"] for rank in ranks) / sum(f.stat().st_size for f in case.size.weight_files(world)),
        "read": max(rank["read"] for rank in ranks),
        "seconds": max(rank["seconds"] for rank in ranks),
    }


def _line(row: dict[str, Any]) -> str:
    sizes = (f"{row[key][what] / _MIB:,.0f}" for what in ("network", "all") for key in ("share", "peak", "allowed"))
    cells = [row["model"], f"{row['parameters'] / 1e6:.0f}", row["ranks"], *sizes]
    return f"| {' | '.join(map(str, cells))} | {row['mapped']:.0%} | {row['seconds']:.0f} |"


def _measure(case: Case, world: Path, folder: Path) -> list[dict[str, Any]]:
    """By the worker, one process per rank; a measurement that is there is not repeated."""
    place = folder / case.name
    place.mkdir(parents=True, exist_ok=True)
    out = place / "measured.json"
    if not out.is_file():
        config = place / "config.yaml"
        config.write_text(yaml.safe_dump(case.config(world).model_dump(mode="json")), encoding="utf-8")
        arguments = [str(config), str(out)]
        run_ranks(loading_worker.__name__, arguments, case.ranks, place, {"OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text(encoding="utf-8"))
