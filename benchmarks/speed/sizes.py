"""What is timed: models of three sizes, and the run that all loops make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.full_size import DEFAULT_MODEL, FullSize
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.paths import resolve_path
from opd_ds.miniature.networks import Sizes, make_pipeline
from opd_ds.miniature.world import TASKS
from opd_ds.models import lora
from opd_ds.models.sd3 import SD3

_PROMPTS = ["a red 3 on blue", "a green 7 on white", "a blue 0 on red", "the number 5"]
_MINIATURE = "package:miniature/assets"
# 59 million parameters.
_MIDDLE = Sizes(layers=3, heads=12, head_dim=64)
_RANK = 32
_TEXT_LENGTH = 128  # T5 tokens of SD3.5-Medium's prompts; the paper's


@dataclass(frozen=True)
class Setting:
    """LoRA student and LoRA teachers on one base, or a full-parameter student and full teachers."""

    kind: str
    placement: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.placement}"

    @property
    def modes(self) -> tuple[str, ...]:
        """Ours: teachers that come and go cannot be asked at every step."""
        return ("buffered", "fused") if self.placement == "resident" else ("buffered",)


SETTINGS = (Setting("lora", "resident"), Setting("full", "resident"), Setting("full", "offload"))


@dataclass(frozen=True)
class Size:
    """A base, three full teachers and three LoRA teachers.

    Attributes:
        write: makes its files in a folder, once, and gives the sections of a run config that name them: `model`, and
            by task `prompts` and the paths of `full` and `lora` teachers.
        repetitions: rounds of every loop beside the one that warms up.
        scored: there are rewards for its images.
    """

    name: str
    write: Callable[[Path], dict[str, Any]]
    repetitions: int
    needs_gpu: bool = False
    scored: bool = False


def run_config(size: Size, setting: Setting, ranks: int, samples: int, folder: Path, **changes: Any) -> DistilConfig:
    """The paper's round: `samples` prompts per device and task, 10 steps of which 9 are trained, its guidances.

    Args:
        changes: of sections, by name.
    """
    found = size.write(folder)
    tasks = {}
    for task, guidance in zip(TASKS, (4.5, 1.0, 4.5), strict=True):
        teacher = {"path": found[setting.kind][task], "guidance": guidance, "placement": setting.placement}
        prompts = found["prompts"][task]
        tasks[task] = {"teacher": teacher | {"trust_base": True}, "prompts": prompts, "weight": 1 / len(TASKS)}
    pairs = 9 * samples
    data: dict[str, Any] = {
        "run": {"rounds": 1000, "output_dir": str(folder / "run")},
        "model": found["model"],
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "deepspeed": "zero0",  # as DDP: everything on every rank
        "student": {"kind": setting.kind, "lora": {"rank": _RANK, "alpha": 2 * _RANK}, "ema": {"every": 8}},
        "optimizer": {"lr": 3e-4},
        "rollout": {
            "mode": "buffered",
            "samples": samples * ranks,
            "steps": 10,
            "guidance": 4.5,
            "micro_batch": samples * len(TASKS),
            "trained_steps": {"fraction": 0.99},
        },
        "train": {"micro_batch": pairs},
        "tasks": tasks,
    }
    for section, values in changes.items():
        data[section] = data.get(section, {}) | values if isinstance(values, dict) else values
    config = parse_config(data)
    assert isinstance(config, DistilConfig)
    return config


def write_loras(base: Path, folder: Path) -> dict[str, str]:
    """Random LoRAs of the paper's size on the SD3 at `base`: folders by task. What is there already stays."""
    if not folder.is_dir():
        network = SD3(base, dtype=torch.float32, device=torch.device("cpu")).empty_transformer()
        config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=list(SD3.lora_targets))
        with torch.device("meta"):
            lora.new_adapter(network, "teacher", config)
        shapes = {key: value.shape for key, value in lora.adapter_parameters(network, "teacher").items()}
        for number, task in enumerate(TASKS):
            torch.manual_seed(number)
            state = {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}
            lora.save_peft(state, config, folder / task, base=str(base))
    return {task: str(folder / task) for task in TASKS}


def _miniature(folder: Path) -> dict[str, Any]:
    base = f"{_MINIATURE}/miniature_base"
    return {
        "model": {"path": base, "max_text_length": 10, "text_encoders": "resident"},
        "prompts": {task: f"{_MINIATURE}/prompts/{task}/train.txt" for task in TASKS},
        "full": {task: f"{_MINIATURE}/teachers/{task}" for task in TASKS},
        "lora": write_loras(resolve_path(base, "model.path"), folder / "lora"),
    }


def _middle(folder: Path) -> dict[str, Any]:
    base = folder / "base"
    if not base.is_dir():
        for number, task in enumerate(TASKS, 1):
            teacher = make_pipeline(_PROMPTS, _MIDDLE, seed=number).transformer
            teacher.save_pretrained(folder / "full" / task / "transformer")
        make_pipeline(_PROMPTS, _MIDDLE, seed=0).save_pretrained(base)
        (folder / "prompts.txt").write_text("\n".join(_PROMPTS) + "\n", encoding="utf-8")
    return {
        "model": {"path": str(base), "height": 16, "width": 16, "max_text_length": 10, "text_encoders": "resident"},
        "prompts": dict.fromkeys(TASKS, str(folder / "prompts.txt")),
        "full": {task: str(folder / "full" / task) for task in TASKS},
        "lora": write_loras(base, folder / "lora"),
    }


def _sd35m(folder: Path) -> dict[str, Any]:
    """SD3.5-Medium's own configuration with random weights and random encoded prompts, at 512 pixels."""
    found: dict[str, Any] = {}
    for teachers in ("full", "lora"):
        made = FullSize(DEFAULT_MODEL, 24, "full", teachers, side=512, text_length=_TEXT_LENGTH)
        made.write(folder)
        config = made.config(folder)
        assert isinstance(config, DistilConfig)
        paths = [task.teacher.path for task in config.tasks.values()]
        found[teachers] = dict(zip(TASKS, paths, strict=True))
    model = config.model.model_dump(mode="json", exclude_defaults=True)
    prompts = Path(config.model.path).parent / "prompts.txt"
    return found | {"model": model, "prompts": dict.fromkeys(TASKS, str(prompts))}


_ALL = (
    Size("miniature", _miniature, repetitions=9, scored=True),
    Size("50m", _middle, repetitions=3),
    Size("sd35m", _sd35m, repetitions=5, needs_gpu=True),
)
SIZES = {size.name: size for size in _ALL}
