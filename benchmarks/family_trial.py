"""One family on a tiny random pipeline of its own, measured: drawn as by diffusers, trained under ZeRO-3, saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import yaml
from torch import Tensor, nn

from opd_ds.checkpoint.export_student import EXPORT_FOLDER
from opd_ds.checkpoint.store import CHECKPOINTS_FOLDER
from opd_ds.diffusion import velocity_error
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.models import ModelFamily, build_family, family_class
from opd_ds.plan.inputs import network_inputs, squared_sum
from opd_ds.plan.metering import held_tensors, training_cost
from opd_ds.runs.export import checkpointed_student
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny.parts import references

KINDS = ("full", "lora")
GUIDANCES = (1.0, 3.5)
_TEXTS = ("encoder_hidden_states", "cap_feats")  # how networks name the prompt's states
DS_CONFIG = {
    # Everything is under the default threshold here and would never be partitioned.
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
}


@dataclass(frozen=True)
class Trial:
    """One family's tiny world in `folder`: base/, teacher/ (of another seed), prompts.txt, <kind>.yaml and its run."""

    name: str
    folder: Path

    def write(self) -> None:
        """Pipelines, prompts and the configs of one round, full and LoRA."""
        tiny = checks.tiny_module(self.name)
        self.folder.mkdir(parents=True)
        tiny.write(self._base)
        tiny.write(self.folder / "teacher", seed=5)
        self._write_prompts()
        (self.folder / "zero3.json").write_text(json.dumps(DS_CONFIG), encoding="utf-8")
        for kind in KINDS:
            self.config(kind).write_text(yaml.safe_dump(self._settings(kind)), encoding="utf-8")

    def _write_prompts(self) -> None:
        """prompts.txt, and edits.jsonl with reference pictures where the family takes any."""
        (self.folder / "prompts.txt").write_text("\n".join(checks.PROMPTS) + "\n", encoding="utf-8")
        rows = []
        for row, prompt in enumerate(checks.PROMPTS):
            files = [f"{row}-{place}.png" for place in range(len(references(self.family, 1)[0]))]
            for file, picture in zip(files, references(self.family, row + 1)[row], strict=True):
                picture.load().save(self.folder / file)
            rows.append({"prompt": prompt, "image": files})
        if self.family.takes_pictures:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.folder / "edits.jsonl").write_text(text, encoding="utf-8")

    def config(self, kind: str) -> Path:
        return self.folder / f"{kind}.yaml"

    def distance_to_diffusers(self) -> float:
        """Largest difference of our latents to those of the base's own pipeline, over guidances."""
        network = self.family.load_transformer()
        return max(
            _distance(
                self._draw(checks.load_pipeline(self.family, self._base), guidance), self._roll_out(network, guidance)
            )
            for guidance in GUIDANCES
        )

    def distance_of_export(self, kind: str) -> float:
        """Largest difference between what diffusers draws from a run's export and what its checkpoint draws here.

        Raises:
            ValueError: the export draws what the base draws.
        """
        run, guidance = self.folder / kind, GUIDANCES[-1]
        (checkpoint,) = (run / CHECKPOINTS_FOLDER).glob("round-*")
        if kind == "lora":
            pipeline = checks.load_pipeline(self.family, self._base)
            checks.load_lora(self.family, pipeline, run / EXPORT_FOLDER)
        else:
            pipeline = checks.load_pipeline(self.family, run / EXPORT_FOLDER)
        ours = self._roll_out(checkpointed_student(self.family, checkpoint), guidance)
        distance = _distance(self._draw(pipeline, guidance), ours)
        moved = _distance(ours, self._roll_out(self.family.load_transformer(), guidance))
        if moved < 10 * distance:
            raise ValueError(f"after a {kind} round the student draws what the base draws (difference {moved:.2g})")
        return distance

    def bf16_difference(self) -> float:
        """Median over pairs (state, step) of |loss in bf16 - loss in fp32| / loss in fp32, at the same states."""
        guidance = GUIDANCES[-1]
        rolled = checks.trajectory(
            self.family,
            self.family.load_transformer(),
            checks.PROMPTS,
            checks.noise(self.family),
            guidance,
            checks.STEPS,
            torch.float32,
        )
        assert rolled.states is not None
        exact, rounded = (self._losses(self.build(dtype), rolled.states) for dtype in (torch.float32, torch.bfloat16))
        return float(((rounded - exact).abs() / exact).median())

    def finite_at_both_ends(self) -> bool:
        """Whether no velocity at sigma 1 or 0 is NaN or infinite, in fp32 and bf16."""
        return checks.finite_at_both_ends(self.build)

    def plan_error(self) -> float:
        """Relative error of what the plan expects each further row to keep for the backward, in bytes.

        The plan runs the network without data on inputs that it makes itself; here a real forward is counted. What does
        not grow with the batch (tables of positions) is left out: in a tiny network it would outweigh the rest.
        """
        planned, kept = zip(*(self._kept_of(rows) for rows in (1, 2)), strict=True)
        return (planned[1] - planned[0]) / (kept[1] - kept[0]) - 1

    def build(self, dtype: torch.dtype, **settings: Any) -> ModelFamily:
        """The base; `settings`: of the family, besides the trial's."""
        told = {"text_encoders": "resident", **self._model, **settings}
        return build_family(self.name, self._base, dtype=dtype, device=checks.CPU, **told)

    # ---- the parts ----

    @cached_property
    def family(self) -> ModelFamily:
        return self.build(torch.float32)

    @property
    def _base(self) -> Path:
        return self.folder / "base"

    @cached_property
    def _size(self) -> dict[str, int]:
        """Four by six patches, so that height and width could not be confused; two frames of latents or more."""
        unit = build_family(self.name, self._base, dtype=torch.float32, device=checks.CPU).size_unit
        frames = {} if family_class(self.name).default_frames is None else {"frames": 9}
        return {"height": 4 * unit, "width": 6 * unit, **frames}

    @cached_property
    def _model(self) -> dict[str, Any]:
        return {**self._size, **checks.model_settings(self.name)}

    def _draw(self, pipeline: Any, guidance: float) -> Tensor:
        return checks.draw(checks.tiny_module(self.name), self.family, pipeline, guidance)

    def _roll_out(self, network: nn.Module, guidance: float) -> Tensor:
        return checks.roll_out(self.family, network, guidance)

    def _kept_of(self, rows: int) -> tuple[float, int]:
        """Bytes kept for the backward of so many rows: by the plan, and really."""
        family, network = self.family, self.family.load_transformer()
        cond, _ = checks.encode(family, checks.PROMPTS[:1] * rows)
        noise = SampleNoise(list(range(rows)), family.latent_shape)
        x, sigma = noise.draw(slice(None)), torch.full((rows,), 0.5)
        kept, seen = bytes_kept(network, lambda: family.velocity(family.at_stage(network, 0), x, sigma, cond))
        (text,) = (held_tensors(value)[0].shape[-2] for name, value in seen.items() if name in _TEXTS)
        config = json.loads((self._base / "transformer" / "config.json").read_text(encoding="utf-8"))
        shapes = [tuple(latents.shape[1:]) for latents in cond.stacked_references()]
        inputs = network_inputs(
            family.transformer_class, config, family.latent_shape, rows, text, torch.float32, shapes
        )
        if family.boundary is not None:
            inputs["stage"] = 0
        return training_cost(family.empty_transformer(), inputs, squared_sum).saved, kept

    @torch.no_grad()
    def _losses(self, family: ModelFamily, states: Tensor) -> Tensor:
        """The student's and the teacher's squared distance at `states` [B, T, ...]: [B, T]. Weights would cancel."""
        networks = family.load_transformer(), family.load_transformer(self.folder / "teacher")
        (cond, uncond), sigmas = checks.encode(family, checks.PROMPTS), family.sigmas(checks.STEPS).float()
        stages = family.stages(sigmas)

        def velocity(network: nn.Module, step: int, guidance: float) -> Tensor:
            x = states[:, step]
            sigma: Tensor = sigmas[step].expand(len(x))
            return family.guided_velocity(network, x, sigma, cond, uncond, guidance, stages[step])

        columns = []
        for step in range(checks.STEPS):
            student, teacher = (velocity(network, step, GUIDANCES[-1]) for network in networks)
            columns.append(velocity_error(student, teacher))
        return torch.stack(columns, dim=1)

    def _settings(self, kind: str) -> dict[str, Any]:
        teacher = {"path": str(self.folder / "teacher"), "guidance": GUIDANCES[0]}
        sets: dict[str, Any] = {}
        if not self.family.needs_pictures:
            sets["one"] = str(self.folder / "prompts.txt")
        if self.family.takes_pictures:
            sets["edit"] = {"path": str(self.folder / "edits.jsonl"), "pictures": "image"}
        return {
            "run": {"rounds": 1, "output_dir": str(self.folder / kind)},
            "model": {"family": self.name, "path": str(self._base), **self._model},
            "precision": "fp32",
            "deepspeed": str(self.folder / "zero3.json"),
            "student": {"kind": kind, "lora": {"rank": 4, "alpha": 8}, "ema": {"decay": 0}},
            "optimizer": {"lr": 1e-2},
            "rollout": {"samples": 4, "steps": checks.STEPS, "guidance": GUIDANCES[-1], "micro_batch": 2},
            "train": {"micro_batch": 4},
            "tasks": {name: {"teacher": teacher, "prompts": prompts} for name, prompts in sets.items()},
            "evaluation": {"baselines": False},
        }


class _Kept:
    """What autograd keeps of a tensor; it goes with the part of the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_kept(network: nn.Module, forward: Callable[[], object]) -> tuple[int, dict[str, Any]]:
    """Bytes that `forward` keeps for a backward of `network`, its parameters and inputs left out, its output not; and
    the inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: WeakSet[_Kept] = WeakSet()
    seen: dict[str, Any] = {}
    given: list[Tensor] = []

    def keep(tensor: Tensor) -> _Kept:
        one = _Kept(tensor)
        kept.add(one)
        return one

    def note_inputs(_: nn.Module, __: object, inputs: dict[str, Any]) -> None:
        seen.update(inputs)
        known.update(tensor.untyped_storage().data_ptr() for tensor in held_tensors(inputs))
        kept.clear()  # what came before belongs to no network

    hooks = [
        network.register_forward_pre_hook(note_inputs, with_kwargs=True),
        network.register_forward_hook(lambda _, __, output: given.extend(held_tensors(output))),
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        held = forward()
    for hook in hooks:
        hook.remove()
    storages = [tensor.untyped_storage() for tensor in (*(one.tensor for one in kept), *given)]
    del held
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(nbytes for address, nbytes in sizes.items() if address not in known), seen


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN where there is one."""
    return float((a - b).abs().max())
