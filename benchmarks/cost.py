"""GPU hours and money of the paper's run, by model and cluster, from plans; and what a measured round says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.plan.costs import Costs
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.network import find_model
from opd_ds.plan.passes import Passes, round_passes
from opd_ds.plan.planner import fit, make_plan
from opd_ds.plan.report import assumptions, cost
from opd_ds.utils.markdown import markdown_table

CLUSTERS = ("8xH100-80GB", "8xA100-80GB", "16xH100-80GB")
_PROMPTS = "package:miniature/assets/prompts/text/train.txt"  # a plan reads none


@dataclass(frozen=True)
class Measured:
    """A round that has been measured, and how to plan the same.

    Attributes:
        seconds: by phase.
        rolled: forward passes of its rollouts, which then went to the last step.
        changes: of the run, as `--set` takes them.
    """

    where: str
    devices: str
    seconds: Mapping[str, float]
    rolled: int
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """The paper's run with a model: three LoRA teachers, a LoRA student, 24 trajectories a task, 500 rounds.

    Attributes:
        changes: of the recipe, as `--set` takes them.
    """

    model: str
    recipe: str
    changes: tuple[str, ...] = ()
    measured: Measured | None = None

    def config(self, *changes: str) -> RunConfig:
        return load_config(self.recipe, None, [*self.changes, *changes])


def _three_loras(guidance: float) -> tuple[str, ...]:
    """Changes of a recipe that has two tasks, and a place for each teacher's LoRA."""
    paths = (f"tasks.{task}.teacher.path=teachers/{task}/lora" for task in ("ocr", "aesthetic", "geneval"))
    return (*paths, f"tasks.geneval.teacher.guidance={guidance}", f"tasks.geneval.prompts={_PROMPTS}")


# docs/measurements.md, "What a GPU showed": ours, buffered, shared teachers, 2026-11-27.
_H200 = Measured(
    "one H200, 2026-11-27",
    "1xH200-141GB",
    {"rollout": 1.70, "score": 1.28, "train": 3.59},
    180,
    (
        "rollout.samples=3",
        "rollout.mode=buffered",
        "student.gradient_checkpointing=false",
        "model.text_encoders=cached",
        "scoring.micro_batch=27",
    ),
)
RUNS = (
    Run("SD3.5-Medium", "mopd_sd35m", measured=_H200),
    Run("FLUX.1-dev", "mopd_flux1", _three_loras(3.5)),
    Run("Qwen-Image", "mopd_qwen_image", _three_loras(4.0)),
    Run("Wan 2.1 14B", "mopd_wan21", (*_three_loras(4.5), "model.path=Wan-AI/Wan2.1-T2V-14B-Diffusers")),
)


@dataclass
class Prices:
    """Money for one GPU and hour, by kind; what is not there is assumed by the plan."""

    given: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: list[str]) -> Prices:
        """`H100-80GB=2.5`.

        Raises:
            UserError: another form, or an unknown kind of GPU.
        """
        given = {}
        for text in texts:
            kind, _, price = text.partition("=")
            try:
                given[parse_devices(kind, "--gpu-price").kind.name] = float(price)
            except ValueError:
                raise UserError(f"--gpu-price {text}: needs a kind and a number, as H100-80GB=2.5") from None
        return cls(given)


def bench(folder: Path, say: Callable[[str], None], prices: Prices) -> dict[str, Any]:
    """Plan every run on every cluster; writes cost.json and cost.md."""
    rows = [row for run in RUNS for row in _rows(run, prices, say)]
    found = {
        "rows": rows,
        "assumptions": assumptions(),
        "measured_on": [run.measured.where for run in RUNS if run.measured],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "cost.md").write_text(as_markdown(found), encoding="utf-8")
    return found


def _rows(run: Run, prices: Prices, say: Callable[[str], None]) -> list[dict[str, Any]]:
    config = run.config()
    costs = Costs(find_model(config), config)
    factor = measured_flops = None
    if run.measured is not None:
        factor = correction(run, run.measured, costs)
        measured_flops = parse_devices(run.measured.devices, "measured").kind.flops
    rows = []
    for cluster in CLUSTERS:
        devices = parse_devices(cluster, "cluster")
        setting, plan = fit(config, costs, devices)
        priced = cost(plan, prices.given.get(devices.kind.name))
        rows.append(
            {
                "model": run.model,
                "cluster": cluster,
                "setting": f"{setting.deepspeed}, teachers {setting.placement}, {plan.config.rollout.mode}",
                "round_seconds": plan.seconds.total,
                "hours": plan.seconds.total * config.run.rounds / 3600,
                **priced,
                "pass_units": _units(plan.config),
                "correction": factor if devices.kind.flops == measured_flops else None,
            }
        )
        say(f"{run.model} on {cluster}: {priced['device_hours']:,.0f} GPU hours")
    return rows


def correction(run: Run, measured: Measured, costs: Costs) -> float:
    """Measured seconds by planned ones of the same passes."""
    config = run.config(*measured.changes)
    plan = make_plan(config, costs, parse_devices(measured.devices, "measured"))
    planned = dict(plan.seconds.phases)
    rolled = sum(round_passes(config, task)["rollout"].forward for task in config.tasks)
    planned["rollout"] *= measured.rolled / rolled
    return sum(measured.seconds.values()) / sum(planned[phase] for phase in measured.seconds)


def _units(config: RunConfig) -> float:
    """Pass units of the run (a backward pass counts as two)."""
    passes = (one for task in config.tasks for one in round_passes(config, task).values())
    return sum(passes, Passes()).units * config.run.rounds


def as_markdown(found: Mapping[str, Any]) -> str:
    """The sheet, assumptions below it."""
    head = ["model", "GPUs", "the fastest setting that fits", "s a round", "hours", "pass units, millions"]
    head += ["GPU hours", "US dollars a GPU hour", "US dollars", "GPU hours, corrected", "US dollars, corrected"]
    cells = [
        [
            row["model"],
            row["cluster"],
            row["setting"],
            f"{row['round_seconds']:.1f}",
            f"{row['hours']:.1f}",
            f"{row['pass_units'] / 1e6:.1f}",
            f"{row['device_hours']:,.0f}",
            f"{row['price_per_hour']:.2f}" + (", assumed" if row["assumed"] else ""),
            f"{row['money']:,.0f}",
            *_corrected(row),
        ]
        for row in found["rows"]
    ]
    where = ", ".join(found["measured_on"])
    lines = [
        f"- corrected: times the seconds of a buffered round on {where} by those planned for it; for GPUs of its peak"
    ]
    return "\n".join(
        [
            "# GPU hours and money for the paper's run\n",
            markdown_table(head, cells, 3),
            *(f"- {line}" for line in found["assumptions"]),
            *lines,
            "",
        ]
    )


def _corrected(row: Mapping[str, Any]) -> list[str]:
    if row["correction"] is None:
        return ["not measured", "not measured"]
    factor = row["correction"]
    return [f"{factor * row['device_hours']:,.0f} (x {factor:.2f})", f"{factor * row['money']:,.0f}"]
