"""Random SD3 worlds of some ten thousand parameters, for tests that need no trained weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file

from opd_ds.config.schema import RunConfig
from opd_ds.models import lora
from opd_ds.plan.costs import Costs
from opd_ds.plan.network import find_model
from opd_ds.testing.tiny.sd3 import PROMPTS
from opd_ds.testing.tiny.sd3 import write as write_pipeline

# Everything is under the default persistence threshold here and would never be partitioned.
ALL_SHARDED = str(Path(__file__).parent / "all_sharded.json")
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]


def write_lora(
    base: Path,
    folder: Path,
    seed: int = 1,
    *,
    rank: int = 4,
    base_name: str | None = None,
    kind: Any = SD3Transformer2DModel,
    targets: Sequence[str] = TARGETS,
) -> Path:
    """A random LoRA in PEFT's folder form, as released adapters are; `kind`: the network's class."""
    torch.manual_seed(seed)
    network = kind.from_pretrained(base, subfolder="transformer")
    lora.new_adapter(network, "x", LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))
    state = {
        f"base_model.model.{key}": torch.randn_like(value) * 0.3
        for key, value in lora.adapter_parameters(network, "x").items()
    }
    folder.mkdir(parents=True)
    save_file(state, folder / lora.PEFT_WEIGHTS)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    (folder / lora.PEFT_CONFIG).write_text(json.dumps(fields | {"base_model_name_or_path": base_name or base.name}))
    return folder


def write_world(root: Path) -> Path:
    """base/, other/ (a full teacher), adapter/ and adapter2/ (LoRA teachers), prompts.txt under `root`."""
    write_pipeline(root / "base")
    write_pipeline(root / "other", seed=5)
    write_lora(root / "base", root / "adapter")
    write_lora(root / "base", root / "adapter2", seed=2, rank=2)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def run_settings(world: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run config as a mapping; `changes` are dotted keys with '__' for '.'."""
    data: dict[str, Any] = {
        "run": {"rounds": 3, "seed": 0, "output_dir": str(output_dir), "checkpoint_every": 100},
        "model": {"path": str(world / "base"), "max_text_length": 10},
        "precision": "fp32",
        "deepspeed": ALL_SHARDED,
        "student": {"kind": "full", "lora": {"rank": 4, "alpha": 8, "targets": TARGETS}},
        "optimizer": {"lr": 1e-3},
        "rollout": {"samples": 4, "steps": 4, "guidance": 2.0, "micro_batch": 4},
        "train": {"micro_batch": 8},
        "tasks": {
            "one": {"teacher": {"path": str(world / "other"), "guidance": 1.0}, "prompts": str(world / "prompts.txt")},
            "two": {
                "teacher": {"path": str(world / "adapter"), "guidance": 3.0},
                "prompts": str(world / "prompts.txt"),
            },
        },
        "evaluation": {"steps": 4, "baselines": False},
    }
    return with_changes(data, changes)


def with_changes(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`data`, changed in place; keys are dotted with '__' for '.'."""
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return data


def write_config(file: Path, data: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(data))
    return file


def costs_of(config: RunConfig) -> Costs:
    """What a plan of the run measures."""
    return Costs(find_model(config), config)
