"""Weights: adapters, checkpoints and bases, given to `opd-ds train --dry-run`, and to the loaders where it accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from peft import LoraConfig
from safetensors.torch import load, save
from torch import Tensor

from benchmarks.bad_input.configs import DRY_RUN, recipe, write_settings
from benchmarks.bad_input.mutations import damaged, near, spoiled
from benchmarks.bad_input.trial import Kind, command
from opd_ds.cluster.world import World
from opd_ds.config.loading import load_config
from opd_ds.config.paths import package_root
from opd_ds.models import lora
from opd_ds.runs.files import find_files
from opd_ds.training.networks import load_family, student_module
from opd_ds.training.teachers import TeacherPool

_BASE = package_root() / "miniature/assets/miniature_base"
_TEACHER = package_root() / "miniature/assets/teachers/text"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2618560\n"
_DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)
_SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda value: value[:-1],
    lambda value: value[:0],
    lambda value: value.flatten(),
    lambda value: value.unsqueeze(0),
    lambda value: value.movedim(0, -1),
    lambda value: value.sum(),
)

Files = dict[str, bytes]


@cache
def _adapter() -> Files:
    """A LoRA in PEFT's form."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel.from_pretrained(_BASE, subfolder="transformer")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["attn.to_q", "attn.to_k"])
    lora.new_adapter(network, "x", config)
    state = {f"base_model.model.{key}": value.detach() for key, value in lora.adapter_parameters(network, "x").items()}
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn.to_q", "attn.to_k"],
              "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False,
              "use_rslora": False, "base_model_name_or_path": "miniature_base"}  # fmt: skip
    return {lora.PEFT_WEIGHTS: save(state), lora.PEFT_CONFIG: json.dumps(fields).encode()}


def _folder(place: Path) -> Files:
    return {str(file.relative_to(place)): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


@st.composite
def _spoiled_files(draw: DrawFn, files: Files) -> Files:
    """`files` with one of them spoiled in its own form, damaged, missing, or a git-lfs pointer."""
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    how = draw(st.sampled_from(["form", "form", "form", "damage", "remove", "pointer", "rename"]))
    others = {other: value for other, value in files.items() if other != name}
    if how == "form":
        return others | {name: draw(_spoiled_form(name, content))}
    if how == "damage":
        return others | {name: draw(damaged(content))}
    if how == "pointer":
        return others | {name: _POINTER}
    return others | ({draw(near(name)).strip("/"): content} if how == "rename" else {})


def _spoiled_form(name: str, content: bytes) -> SearchStrategy[bytes]:
    if name.endswith(".json"):
        return spoiled(json.loads(content)).map(lambda data: json.dumps(data).encode())
    return _spoiled_tensors(content)


@st.composite
def _spoiled_tensors(draw: DrawFn, content: bytes) -> bytes:
    """A safetensors file whose tensors have other names, types or shapes."""
    state = load(content)
    for _ in range(draw(st.integers(1, 3))):
        if not state:
            break
        key = draw(st.sampled_from(sorted(state)))
        value = state.pop(key)
        how = draw(st.sampled_from(["name", "dtype", "shape", "remove", "add"]))
        if how == "name":
            state[draw(near(key))] = value
        elif how == "dtype":
            state[key] = value.to(draw(st.sampled_from(_DTYPES)))
        elif how == "shape":
            state[key] = draw(st.sampled_from(_SHAPES))(value).clone(memory_format=torch.contiguous_format)
        elif how == "add":
            state |= {key: value, draw(near(key)): value.clone()}
    return save(state)


def _write(files: Files, folder: Path, *, base: bool = False) -> None:
    data = recipe("miniature")
    data["tasks"] = {"text": data["tasks"]["text"]}
    place = folder / ("base" if base else "teacher")
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    if base:
        data["model"]["path"] = str(place)
    else:
        data["tasks"]["text"]["teacher"]["path"] = str(place)
        data["student"] |= {"kind": "lora", "lora": {"rank": 2, "alpha": 4}}
    place.mkdir(exist_ok=True)
    write_settings(data, folder)


def _write_base(files: Files, folder: Path) -> None:
    _write(files, folder, base=True)


def _ask(_: Files, folder: Path) -> None:
    command(DRY_RUN)
    config = load_config(None, folder / "run.yaml", [])
    files, device = find_files(config, World()), torch.device("cpu")
    config = config.with_teachers({name: spec.settings for name, spec in files.teachers.items()})
    family = load_family(config, files.model, device)
    student_module(config.student, config.run.seed, family, files.start)
    own = {name: spec for name, spec in files.teachers.items() if spec.settings.placement != "shared"}
    TeacherPool(family, own, device)
    family.load_encoders()
    family.decode(torch.zeros(1, *family.latent_shape))
    for name in (name for name in files.teachers.keys() - own.keys() if files.teachers[name].is_lora):
        lora.read_adapter(files.teachers[name].path, family.pipeline_class)


KINDS = (
    Kind("weights: adapter", st.deferred(lambda: _spoiled_files(_adapter())), _write, _ask),
    Kind("weights: checkpoint", st.deferred(lambda: _spoiled_files(_folder(_TEACHER))), _write, _ask),
    Kind("weights: base", st.deferred(lambda: _spoiled_files(_folder(_BASE))), _write_base, _ask),
)
