"""`opd-ds bench plan --full-size`: a round of SD3.5-Medium in its true width, with random weights, beside its plan.

Nothing is downloaded: the network is made from the configuration that the plan keeps, encoded prompts are random, and
no picture is decoded, so neither text encoders nor a VAE are needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.config import RunConfig
from opd_ds.loading import parse_config
from opd_ds.models import Conditioning, lora
from opd_ds.models.sd3 import SD3
from opd_ds.plan.network import known_configs
from opd_ds.text_cache import TextCache, encoders_identity

_MODEL = "stable-diffusion-3.5-medium"
_TASKS = ("geneval", "ocr", "aesthetic")
_PROMPTS = ["a red 3", "a green 7", "a blue 0"]
_RANK = 32


@dataclass(frozen=True)
class FullSize:
    """Three teachers, all LoRAs in one resident base or all full and offloaded, and a student."""

    layers: int
    kind: str
    teachers: str
    side: int = 64  # pixels; 64 is little work for a CPU, and states outweigh activations as in a real run
    stage: int = 2
    precision: str = "bf16"
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"sd35m-{self.layers}-layers-{self.kind}-{self.teachers}-teachers-{self.side}px"

    def config(self, world: Path) -> RunConfig:
        """One sample per task, two steps."""
        folder = world / f"{self.layers}-layers"
        placement = "resident" if self.teachers == "lora" else "offload"
        tasks = {
            task: {
                "teacher": {
                    "path": str(folder / f"{self.teachers}-{task}"),
                    "guidance": 1.0,
                    "placement": placement,
                    "trust_base": True,
                },
                "prompts": str(world / "prompts.txt"),
            }
            for task in _TASKS
        }
        return parse_config(
            {
                "run": {"rounds": 1, "output_dir": str(world / "run")},
                "model": {
                    "path": str(folder / "base"),
                    "height": self.side,
                    "width": self.side,
                    "max_text_length": 16,
                    "text_encoders": "cached",
                    "text_cache": str(folder / "text_cache"),
                },
                "precision": self.precision,
                "deepspeed": f"zero{self.stage}",
                "student": {"kind": self.kind, "gradient_checkpointing": True, "lora": {"rank": _RANK}},
                "rollout": {"samples": 1, "steps": 2, "guidance": 1.0, "micro_batch": 1},
                "train": {"micro_batch": 1},
                "tasks": tasks,
            }
        )

    def write(self, world: Path) -> None:
        """What `config` names; what is there already stays."""
        folder = world / f"{self.layers}-layers"
        if (folder / "text_cache" / "manifest.json").is_file():
            return
        base = folder / "base"
        _write_base(base, self.layers)
        for task in _TASKS:
            _write_full_teacher(folder / f"full-{task}", base)
            _write_lora(folder / f"lora-{task}", base)
        (world / "prompts.txt").write_text("\n".join(_PROMPTS) + "\n", encoding="utf-8")
        _write_prompts(self.config(world))


def cases(layers_of_lora: int, layers_of_full: int) -> tuple[FullSize, ...]:
    """LoRA and full-parameter students, each with LoRA and with full teachers."""
    return tuple(
        FullSize(layers, kind, teachers)
        for kind, layers in (("lora", layers_of_lora), ("full", layers_of_full))
        for teachers in ("lora", "full")
    )


def _write_base(folder: Path, layers: int) -> None:
    configs = known_configs(_MODEL)
    network = configs["transformer"]
    network["num_layers"] = layers
    network["dual_attention_layers"] = [layer for layer in network["dual_attention_layers"] if layer < layers]
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": "StableDiffusion3Pipeline"},
        "vae/config.json": configs["vae"],
        "scheduler/scheduler_config.json": configs["scheduler"],
        "transformer/config.json": network,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    torch.manual_seed(0)
    _random_network(folder).save_pretrained(folder / "transformer")  # type: ignore[operator]


def _write_full_teacher(folder: Path, base: Path) -> None:
    """The same file under another name: loaded apart from the base, and so measured as a network of its own."""
    (folder / "transformer").mkdir(parents=True)
    for file in (base / "transformer").iterdir():
        (folder / "transformer" / file.name).hardlink_to(file)


def _write_lora(folder: Path, base: Path) -> None:
    network = _family(base).empty_transformer()
    config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=list(SD3.lora_targets))
    with torch.device("meta"):
        lora.new_adapter(network, "teacher", config)
    shapes = {key: parameter.shape for key, parameter in lora.adapter_parameters(network, "teacher").items()}
    state = {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}
    lora.save_peft(state, config, folder, base=_MODEL)


def _write_prompts(config: RunConfig) -> None:
    base, network = Path(config.model.path), known_configs(_MODEL)["transformer"]
    cache = TextCache(config.text_cache)
    prompts, tokens = ["", *_PROMPTS], 77 + (config.model.max_text_length or 0)
    embeds = torch.randn(len(prompts), tokens, network["joint_attention_dim"], dtype=torch.bfloat16)
    pooled = torch.randn(len(prompts), network["pooled_projection_dim"], dtype=torch.bfloat16)
    cache.claim(encoders_identity(config, base))
    cache.add(prompts, Conditioning({"embeds": embeds, "pooled": pooled}))


def _family(base: Path) -> SD3:
    return SD3(base, dtype=torch.float16, device=torch.device("cpu"))


def _random_network(base: Path) -> nn.Module:
    """In float16: weights in the run's own dtype would stay in the file's pages instead of the process's memory."""
    network = _family(base).empty_transformer().to(torch.float16).to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.normal_(std=0.02)
    return network
