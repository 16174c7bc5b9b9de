"""`python -m benchmarks plan --full-size`: a round of a real model in its true width, beside its plan.

Nothing is downloaded: the network is made from the configuration that the plan keeps, encoded prompts are random, and
no image is decoded, so neither text encoders nor a VAE are needed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from opd_ds.config.loading import parse_config
from opd_ds.config.schema import RunConfig
from opd_ds.data.text_cache import TextCache, encoders_identity
from opd_ds.errors import UserError, nearest
from opd_ds.models import FAMILIES, Conditioning, ModelFamily, build_family, family_class, lora
from opd_ds.plan.network import find_model, known_configs, known_models

DEFAULT_MODEL = "stable-diffusion-3.5-medium"
_BLOCKS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")  # how configs count each kind of block
_TEXT_WIDTHS = ("joint_attention_dim", "cap_feat_dim", "text_dim")
_MASKED = ("qwen_image", "z_image", "wan")  # their prompts keep their own lengths
_TASKS = ("geneval", "ocr", "aesthetic")
_PROMPTS = ["a red 3", "a green 7", "a blue 0"]
_RANK = 32
_COMPLETE = "complete"


@dataclass(frozen=True)
class FullSize:
    """Three teachers, all LoRAs in one resident base or all full and offloaded, and a student.

    Attributes:
        model: one of `known_models()`.
        layers: how many blocks of each kind are there; of models with fewer all.
    """

    model: str
    layers: int
    kind: str
    teachers: str
    side: int = 64  # pixels; 64 is little work for a CPU, and states outweigh activations as in a real run
    stage: int = 2
    precision: str = "bf16"
    ranks: int = 1
    text_length: int = 16  # tokens of the longest text encoder

    @property
    def name(self) -> str:
        return f"{self.model}-{self.layers}-layers-{self.kind}-{self.teachers}-teachers-{self.side}px"

    @property
    def family(self) -> str:
        """The name of the model's family."""
        transformer = known_configs(self.model)["transformer"]["_class_name"]
        return next(name for name in FAMILIES if family_class(name).transformer_class == transformer)

    def config(self, world: Path) -> RunConfig:
        """One sample per task, two steps, of which the first is trained."""
        folder = self._folder(world)
        frames = {} if family_class(self.family).default_frames is None else {"frames": 5}
        placement = "resident" if self.teachers == "lora" else "offload"
        tasks = {
            task: {
                "teacher": {
                    "path": str(folder / f"{self.teachers}-{task}"),
                    "guidance": 1.0,
                    "placement": placement,
                    "trust_base": True,
                },
                "prompts": str(folder / "prompts.txt"),
            }
            for task in _TASKS
        }
        return parse_config(
            {
                "run": {"rounds": 1, "output_dir": str(world / "run")},
                "model": {
                    "family": self.family,
                    "path": str(folder / "base"),
                    "height": self.side,
                    "width": self.side,
                    "max_text_length": self.text_length,
                    "text_encoders": "cached",
                    "text_cache": str(folder / "text_cache"),
                    **frames,
                },
                "precision": self.precision,
                "deepspeed": f"zero{self.stage}",
                "student": {"kind": self.kind, "gradient_checkpointing": True, "lora": {"rank": _RANK}},
                "rollout": {
                    "mode": "buffered",
                    "samples": 1,
                    "steps": 2,
                    "trained_steps": {"fraction": 0.5},
                    "guidance": 1.0,
                    "micro_batch": 1,
                },
                "train": {"micro_batch": 1},
                "tasks": tasks,
            }
        )

    def write(self, world: Path) -> None:
        """What `config` names; what is there already stays."""
        folder = self._folder(world)
        if (folder / _COMPLETE).is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted start left
        base = folder / "base"
        network = self._write_configs(base)
        family = build_family(self.family, base, dtype=torch.float16, device=torch.device("cpu"))
        torch.manual_seed(0)
        _random_network(family).save_pretrained(base / "transformer")  # type: ignore[operator]
        for task in _TASKS:
            _write_full_teacher(folder / f"full-{task}", base)
            _write_lora(folder / f"lora-{task}", family, self.model)
        (folder / "prompts.txt").write_text("\n".join(_PROMPTS) + "\n", encoding="utf-8")
        config = self.config(world)
        cache = TextCache(config.text_cache)
        prompts = [family.negative_prompt, *_PROMPTS]
        cache.claim(encoders_identity(config, base))
        texts = _random_texts(self.family, network, len(prompts), find_model(config).tokens)
        cache.add(dict(zip(prompts, texts.apart(), strict=True)))
        (folder / _COMPLETE).touch()

    def weight_files(self, world: Path) -> list[Path]:
        """Of the base's network, after `write`."""
        return sorted((self._folder(world) / "base" / "transformer").glob("*.safetensors"))

    def _folder(self, world: Path) -> Path:
        return world / f"{self.model}-{self.layers}-layers"

    def _write_configs(self, base: Path) -> dict[str, Any]:
        """A pipeline's folder without weights; the network's config."""
        configs = known_configs(self.model)
        network = configs["transformer"]
        network |= {key: min(self.layers, network[key]) for key in _BLOCKS if key in network}
        if "dual_attention_layers" in network:
            network["dual_attention_layers"] = [i for i in network["dual_attention_layers"] if i < self.layers]
        files: dict[str, dict[str, Any]] = {
            "model_index.json": {"_class_name": family_class(self.family).pipeline_class},
            "vae/config.json": configs["vae"],
            "scheduler/scheduler_config.json": configs["scheduler"],
            "transformer/config.json": network,
        }
        for name, content in files.items():
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text(json.dumps(content), encoding="utf-8")
        return network


def cases(models: list[str], layers_of_lora: int, layers_of_full: int) -> tuple[FullSize, ...]:
    """LoRA and full-parameter students of each model, each with LoRA and with full teachers.

    Raises:
        UserError: a model whose configs are not kept.
    """
    for model in models:
        if model not in known_models():
            close = nearest(model, known_models())
            raise UserError(f"--model {model}: unknown; allowed: {', '.join(known_models())}.{close}")
    return tuple(
        FullSize(model, layers, kind, teachers)
        for model in models
        for kind, layers in (("lora", layers_of_lora), ("full", layers_of_full))
        for teachers in ("lora", "full")
    )


def _write_full_teacher(folder: Path, base: Path) -> None:
    """The same file under another name: loaded apart from the base, and so measured as a network of its own."""
    (folder / "transformer").mkdir(parents=True)
    for file in (base / "transformer").iterdir():
        (folder / "transformer" / file.name).hardlink_to(file)


def _write_lora(folder: Path, family: ModelFamily, model: str) -> None:
    network = family.empty_transformer()
    config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=list(family.lora_targets))
    with torch.device("meta"):
        lora.new_adapter(network, "teacher", config)
    shapes = {key: parameter.shape for key, parameter in lora.adapter_parameters(network, "teacher").items()}
    state = {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}
    lora.save_peft(state, config, folder, base=model)


def _random_texts(family: str, network: dict[str, Any], count: int, tokens: int) -> Conditioning:
    """`count` prompts as the family encodes them, all of `tokens` tokens."""
    width = next(network[key] for key in _TEXT_WIDTHS if key in network)
    tensors = {"embeds": torch.randn(count, tokens, width, dtype=torch.bfloat16)}
    if "pooled_projection_dim" in network:
        tensors["pooled"] = torch.randn(count, network["pooled_projection_dim"], dtype=torch.bfloat16)
    if family in _MASKED:
        tensors["mask"] = torch.ones(count, tokens, dtype=torch.bool)
    return Conditioning(tensors)


def _random_network(family: ModelFamily) -> nn.Module:
    """In float16: weights in the run's own dtype would stay in the file's pages instead of the process's memory.
    Made on a GPU where there is one: billions of random numbers take a processor minutes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = family.empty_transformer().to(torch.float16).to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.normal_(std=0.02)
    return network
