"""Run configs, `--set` options and ds_configs, given to `opd-ds train --dry-run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from benchmarks.bad_input.mutations import damaged, near, odd_values, spoiled
from benchmarks.bad_input.trial import Kind, command
from opd_ds.config.loading import load_config
from opd_ds.config.paths import package_root

# Everything they name is in the package.
_RECIPES = ("miniature", "miniature_nft_text", "miniature_guard_look")
DRY_RUN = ("train", "--dry-run", "--config", "run.yaml")


def recipe(name: str) -> dict[str, Any]:
    """What a shipped recipe sets."""
    return load_config(name, None, []).model_dump(mode="json", exclude_unset=True)


@st.composite
def _settings(draw: DrawFn) -> str:
    data = draw(spoiled(recipe(draw(st.sampled_from(_RECIPES)))))
    return yaml.safe_dump(data, sort_keys=False)


@st.composite
def _files(draw: DrawFn) -> bytes:
    text = yaml.safe_dump(recipe(draw(st.sampled_from(_RECIPES))), sort_keys=False)
    return draw(damaged(text.encode()))


@st.composite
def _overrides(draw: DrawFn) -> tuple[str, ...]:
    known = _dotted(recipe("miniature"))
    keys = st.sampled_from([*known, "a", "", ".", "tasks..x", "run", "anchor.path", "probes.x", "teach.algorithm"])
    found = []
    for _ in range(draw(st.integers(1, 2))):
        key = draw(keys)
        value = draw(near(known[key]) if key in known and draw(st.booleans()) else odd_values())
        text = yaml.safe_dump(value, default_flow_style=True)
        found.append(f"{key}={text.splitlines()[0]}")
    return tuple(found)


def _dotted(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {prefix + key: value for key, value in data.items()}
    for key, value in data.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
    return found


_HUGGING_FACE: dict[str, Any] = {  # as transformers' documentation has it
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
_DS_CONFIGS: list[dict[str, Any]] = [
    *(json.loads(file.read_text(encoding="utf-8")) for file in sorted((package_root() / "ds_configs").glob("*.json"))),
    _HUGGING_FACE,
    {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Muon", "params": {"momentum": 0.9}}},
    {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": True}, "elasticity": {"enabled": True}},
]
_REPORTED: tuple[dict[str, Any], ...] = (
    _HUGGING_FACE,
    _HUGGING_FACE
    | {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}},
    {"zero_optimization": True},
    {"zero_optimization": None},
    {"zero_optimization": {"stage": 2, "offload_optimizer": None, "offload_param": None}},
    {"zero_optimization": {"stage": 2}, "optimizer": {"type": "adamw", "params": {}}},
    {"zero_optimization": {"stage": 2}, "optimizer": {"type": "adamw"}},
    {"zero_optimization": {"stage": 2}, "optimizer": "adamw"},
    {"zero_optimisation": {"stage": 3}, "gradient_cliping": 1.0},
    {"zero_optimization": {"stage": 2}, "wandb": {"enabled": True}, "flops_profiler": {"enabled": True}},
    {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 15099494.4}},
    {"zero_optimization": {"stage": 3}, "elasticity": {"enabled": True, "max_train_batch_size": 2000, "version": 0.1}},
)


def write_settings(data: dict[str, Any], folder: Path) -> None:
    """The run config of an input."""
    (folder / "run.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")


def _write_text(text: str | bytes, folder: Path) -> None:
    (folder / "run.yaml").write_bytes(text.encode() if isinstance(text, str) else text)


def _write_recipe(_: Any, folder: Path) -> None:
    write_settings(recipe("miniature"), folder)


def _write_ds_config(data: Any, folder: Path) -> None:
    write_settings({**recipe("miniature"), "deepspeed": "ds.json"}, folder)
    (folder / "ds.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def _dry_run(_: Any, folder: Path) -> None:
    command(DRY_RUN)


def _dry_run_with(overrides: tuple[str, ...], folder: Path) -> None:
    command([*DRY_RUN, *(word for override in overrides for word in ("--set", override))])


_damaged_ds_configs = st.sampled_from(_DS_CONFIGS).flatmap(lambda data: damaged(json.dumps(data, indent=1).encode()))
_spoiled_ds_configs = st.sampled_from(_DS_CONFIGS).flatmap(spoiled)

KINDS = (
    Kind("run config: settings", _settings(), _write_text, _dry_run),
    Kind("run config: file", _files(), _write_text, _dry_run),
    Kind("run config: --set", _overrides(), _write_recipe, _dry_run_with, known=(("run.rounds=24333867207155",),)),
    Kind("ds_config: settings", _spoiled_ds_configs, _write_ds_config, _dry_run, known=_REPORTED),
    Kind("ds_config: file", _damaged_ds_configs, _write_ds_config, _dry_run),
)
