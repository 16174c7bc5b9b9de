"""The part `invariants`: rounds that must be equal, with a tiny SD3, in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.gpu.session import Session, synchronise
from benchmarks.speed.sizes import write_loras
from opd_ds.checkpoint.store import CHECKPOINTS_FOLDER
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.teachers import TeacherSection
from opd_ds.miniature.world import TASKS
from opd_ds.runs.monitor import METRICS_FILE, read_metrics
from opd_ds.runs.setup import prepare
from opd_ds.runs.train import train
from opd_ds.testing.tiny import sd3

_PRECISIONS = ("fp32", "bf16")
# Largest relative difference that is rounding: sums in another order.
_ROUNDING = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
_SCALES_TRIED = 24  # fp16 halves its loss scale, of 2^16 at first, with each round that overflows
_ROUNDS, _SAVED = 4, 2


def invariants(session: Session) -> None:
    """Losses and gradient norms of two rounds, against those of the plainest setting."""
    # Convolutions of float32 in TF32 would hide what is compared.
    torch.backends.cudnn.allow_tf32 = False
    world = _World(session)
    _own_teacher(session, world)
    for precision in _PRECISIONS if session.on_gpu else _PRECISIONS[:1]:
        _equal_rounds(session, world, precision)
    if session.on_gpu:  # DeepSpeed knows no fp16 on CPUs
        _half_precision(session, world)
    _resume(session, world)


def placements() -> list[str]:
    """All that this version has for teachers."""

    def texts(annotation: Any) -> list[str]:
        return [annotation] if isinstance(annotation, str) else [t for arg in get_args(annotation) for t in texts(arg)]

    return texts(TeacherSection.model_fields["placement"].annotation)


class _World:
    """A tiny base, a full teacher, LoRA teachers, and runs with them."""

    def __init__(self, session: Session) -> None:
        self.folder, self._session = session.scratch / "tiny", session
        self.base, self.other = sd3.write(self.folder / "base"), sd3.write(self.folder / "other", seed=5)
        self.loras = write_loras(self.base, self.folder / "loras")
        self.prompts = self.folder / "prompts.txt"
        self.prompts.write_text("\n".join(sd3.PROMPTS) + "\n", encoding="utf-8")
        self.sharded = self.folder / "all_sharded.json"  # tiny parameters are below the usual threshold
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        optimizer = {"type": "AdamW", "params": {"lr": "auto"}}
        self.sharded.write_text(json.dumps({"zero_optimization": zero, "optimizer": optimizer}), encoding="utf-8")

    def task(self, path: Path | str, placement: str, guidance: float) -> dict[str, Any]:
        teacher = {"path": str(path), "guidance": guidance, "placement": placement, "trust_base": True}
        return {"teacher": teacher, "prompts": str(self.prompts)}

    def config(
        self, precision: str = "fp32", stage: int = 0, placement: str = "resident", **changes: Any
    ) -> DistilConfig:
        """`changes` are of sections, by name. Only LoRAs on the student's base can share its network."""
        one = self.loras[TASKS[1]] if placement == "shared" else self.other
        data: dict[str, Any] = {
            "run": {"rounds": _ROUNDS, "output_dir": str(self.folder / "run"), "checkpoint_every": _SAVED},
            "model": {"path": str(self.base), "max_text_length": 10, "text_encoders": "resident"},
            "precision": precision,
            "deepspeed": str(self.sharded) if stage == 3 else f"zero{stage}",
            "student": {"kind": "lora" if placement == "shared" else "full"},
            "optimizer": {"lr": 1e-3},
            "rollout": {"mode": "buffered", "samples": 4, "steps": 4, "guidance": 2.0, "micro_batch": 8},
            "train": {"micro_batch": 8},
            "tasks": {
                "one": self.task(one, placement, 1.0),
                "two": self.task(self.loras[TASKS[0]], placement, 3.0),
            },
        }
        for section, values in changes.items():
            data[section] = {**data[section], **values} if section != "tasks" else values
        return DistilConfig.model_validate(data)

    def rounds(self, config: DistilConfig, count: int = 2) -> dict[str, list[float]]:
        parts = prepare(config, self._session.group)
        reports = [parts.trainer.run_round(index) for index in range(count)]
        synchronise()
        return {"loss": [r.losses.loss for r in reports], "norm": [r.grad_norm for r in reports]}


def _difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """The largest relative one."""
    pairs = [(a, b) for key, values in expected.items() for a, b in zip(found[key], values, strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-30) if math.isfinite(a) else math.inf for a, b in pairs)


def _own_teacher(session: Session, world: _World) -> None:
    for precision in _PRECISIONS if session.on_gpu else _PRECISIONS[1:]:
        for placement in (*placements(), "fused"):
            with session.check(f"own teacher, {placement}, {precision}") as found:
                shares = placement == "shared"  # only a LoRA can: here the one that the student starts from
                path = world.loras[TASKS[0]] if shares else world.base
                own = world.task(path, "resident" if placement == "fused" else placement, 2.0)
                mode = "fused" if placement == "fused" else "buffered"
                changes: dict[str, Any] = {"rollout": {"mode": mode}, "tasks": {"self": own}}
                if shares:
                    adapter = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
                    size = {"rank": adapter["r"], "alpha": adapter["lora_alpha"], "targets": adapter["target_modules"]}
                    changes["student"] = {"kind": "lora", "start": str(path), "lora": size}
                got = world.rounds(world.config(precision, **changes), 1)
                found |= {"loss": got["loss"][0], "norm": got["norm"][0]}
                found["ok"] = got == {"loss": [0.0], "norm": [0.0]}


def _equal_rounds(session: Session, world: _World, precision: str) -> None:
    expected: dict[str, list[float]] = {}
    with session.check(f"reference: ZeRO-0, resident, buffered, {precision}") as found:
        expected |= world.rounds(world.config(precision))
        found |= {"loss": expected["loss"][0], "norm": expected["norm"][0]}
    plain: dict[str, dict[str, Any]] = {
        "the same again": {},
        "fused": {"rollout": {"mode": "fused"}},
        "other micro-batches": {"train": {"micro_batch": 3}, "rollout": {"micro_batch": 3}},
        "gradient checkpointing": {"student": {"gradient_checkpointing": True}},
    }
    cases = {name: world.config(precision, **changes) for name, changes in plain.items()}
    cases |= {f"ZeRO-{stage}": world.config(precision, stage) for stage in (1, 2, 3)}
    for gather in ("once", "per_layer"):
        cases[f"ZeRO-3, gather {gather}"] = world.config(precision, 3, rollout={"gather": gather})
    others = [placement for placement in placements() if placement not in ("resident", "shared")]
    cases |= {placement: world.config(precision, placement=placement) for placement in others}
    for name, config in cases.items():
        with session.check(f"{name}, {precision}") as found:
            got = world.rounds(config)
            worst = _difference(got, expected)
            found |= {"difference": worst, "bit for bit": got == expected, "ok": worst < _ROUNDING[precision]}
    if "shared" in placements():
        with session.check(f"shared against resident LoRAs, {precision}") as found:
            shared = world.config(precision, placement="shared")
            alone = {name: task.model_dump(mode="json") for name, task in shared.tasks.items()}
            for task in alone.values():
                task["teacher"]["placement"] = "resident"
            resident = world.rounds(world.config(precision, student={"kind": "lora"}, tasks=alone))
            got = world.rounds(shared)
            worst = _difference(got, resident)
            found |= {"difference": worst, "bit for bit": got == resident, "ok": worst < _ROUNDING[precision]}


def _half_precision(session: Session, world: _World) -> None:
    """Rounds with an overflow leave the weights alone, so round 0 can be asked for until one is without."""
    for stage in (2, 3):
        with session.check(f"ZeRO-{stage}, fp16") as found:
            expected = world.rounds(world.config("fp32"), 1)
            trainer = prepare(world.config("fp16", stage), session.group).trainer
            report, overflows = trainer.run_round(0), 0
            while not math.isfinite(report.grad_norm) and overflows < _SCALES_TRIED:
                report, overflows = trainer.run_round(0), overflows + 1
            got = {"loss": [report.losses.loss], "norm": [report.grad_norm]}
            worst = _difference(got, expected)
            found |= {"loss": got["loss"][0], "norm": got["norm"][0], "difference": worst, "overflows": overflows}
            found["ok"] = worst < _ROUNDING["fp16"]


def _resume(session: Session, world: _World) -> None:
    """Rounds after a checkpoint, once straight on and once from the files."""
    stages = ((2, 2), (3, 3), (2, 3)) if session.on_gpu else ((2, 3),)
    for before, after in stages:
        with session.check(f"resume, ZeRO-{before} to {after}, bf16") as found:
            folder = world.folder / f"resume-{before}-{after}"

            def config(stage: int, folder: Path = folder) -> DistilConfig:
                return world.config("bf16", stage, run={"output_dir": str(folder), "keep_checkpoints": _ROUNDS})

            train(config(before), session.group)
            straight = _metrics(folder)
            checkpoint = folder / CHECKPOINTS_FOLDER / f"round-{_SAVED:06d}"
            train(config(after), session.group, str(checkpoint))
            got = _metrics(folder)
            worst = _difference(got, straight)
            found |= {"difference": worst, "bit for bit": got == straight, "ok": worst < _ROUNDING["bf16"]}


def _metrics(folder: Path) -> dict[str, list[float]]:
    rows = read_metrics(folder / METRICS_FILE)[_SAVED:]
    return {"loss": [row["loss"] for row in rows], "norm": [row["grad_norm"] for row in rows]}
