"""Wan 2.2 A14B text-to-video: one network for high, one for low sigmas, through diffusers' own classes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn

from opd_ds.errors import UserError, shown
from opd_ds.models.inspection import read_config, weight_files
from opd_ds.models.own_weights import check_own_weights
from opd_ds.models.stored_weights import Stored, open_weights
from opd_ds.models.two_networks import PARTS, TwoNetworks, joined, of_part
from opd_ds.models.wan import Wan
from opd_ds.models.weight_files import read_shapes, refuse_other_shapes
from opd_ds.utils.atomic_io import apply_umask


class WanA14B(Wan):
    """`transformer` denoises from sigma 1 down to `boundary_ratio`, `transformer_2` below.

    A LoRA is a folder with one for each network, `transformer/` and `transformer_2/`, or for one of them.

    Raises:
        UserError: beside what Wan refuses: a folder with one network, or networks that differ in their interface.
    """

    networks = PARTS
    pipeline_parts: ClassVar = dict.fromkeys((*PARTS, "vae"))
    example = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        self._second_config = self._read_config(f"{PARTS[1]}/config.json")
        for key in ("_class_name", *self.transformer_keys):
            ours, theirs = self._transformer_config.get(key), self._second_config.get(key)
            if ours != theirs:
                raise UserError(
                    f"model.path = {path}: {PARTS[1]}/config.json has {key} = {shown(theirs)}, {PARTS[0]} has "
                    f"{shown(ours)}; both must have one interface"
                )

    def _check_networks(self) -> None:
        self.boundary = _boundary(self.path)

    def empty_transformer(self) -> nn.Module:
        with torch.device("meta"):
            return TwoNetworks(*(self._network_class.from_config(config) for config in self._configs))

    @property
    def _configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._transformer_config, self._second_config

    @property
    def _network_class(self) -> Any:
        return getattr(diffusers, self.transformer_class)

    def _open(self, source: Path) -> tuple[dict[str, Any], Stored]:
        folders = _folders(source)
        stored = {part: open_weights(weight_files(folder)) for part, folder in folders.items()}
        return joined({part: read_config(folder) for part, folder in folders.items()}), joined(stored)

    def _unfilled(self, config: dict[str, Any], stored: Stored) -> nn.Module:
        return TwoNetworks(*(Wan._unfilled(self, of_part(config, part), of_part(stored, part)) for part in PARTS))

    def check_same_weights(self, path: Path) -> None:
        wanted = {key: tuple(value.shape) for key, value in self.empty_transformer().state_dict().items()}
        found = {part: read_shapes(weight_files(folder)) for part, folder in _folders(path).items()}
        refuse_other_shapes(joined(found), wanted, "the base")

    def check_compatible(self, path: Path) -> None:
        folders = _folders(path)
        super().check_compatible(path)
        second = read_config(folders[PARTS[1]])
        for key in ("_class_name", *self.transformer_keys):
            if second.get(key) != self._second_config.get(key):
                raise UserError(
                    f"{PARTS[1]}/config.json has {key} = {shown(second.get(key))}, the student has "
                    f"{shown(self._second_config.get(key))}; teacher and student must share the networks' interface"
                )
        if (path / "model_index.json").is_file() and (theirs := _boundary(path)) != self.boundary:
            raise UserError(
                f"model_index.json has boundary_ratio = {theirs}, the student has {self.boundary}; teacher and student "
                "must change networks at the same sigma"
            )
        check_own_weights(self._network_class, folders[PARTS[1]], f"{PARTS[1]}/config.json")

    def save_full(self, transformer_state: dict[str, Tensor], folder: Path) -> None:
        shutil.copytree(self.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*PARTS))
        for part, config in zip(PARTS, self._configs, strict=True):
            network = self._network_class.from_config(config)
            network.load_state_dict(of_part(transformer_state, part))
            network.to(self.dtype).save_pretrained(folder / part)
        apply_umask(*(file for file in folder.rglob("*") if file.is_file()))

    def save_lora(self, adapter_state: dict[str, Tensor], lora_config: Any, folder: Path) -> None:
        """A folder for each adapted network: the pipeline's `load_lora_weights` reads the first, and the second with
        `load_into_transformer_2=True`.
        """
        for part in PARTS:
            state = of_part(adapter_state, part)
            if state:
                super().save_lora(state, _for_modules(lora_config, state), folder / part)


def _for_modules(config: LoraConfig, state: dict[str, Tensor]) -> LoraConfig:
    """The configuration, with the names that the adapted modules have in one network alone."""
    found = copy.copy(config)
    found.target_modules = {key.rsplit(".lora_", 1)[0] for key in state}
    return found


def _folders(path: Path) -> dict[str, Path]:
    """Where both networks of a checkpoint are; raises UserError where one is missing."""
    for part in PARTS:
        if not (path / part).is_dir():
            raise UserError(f"{path}: no {part}/; expected a diffusers folder with {' and '.join(PARTS)}")
    return {part: path / part for part in PARTS}


def _boundary(path: Path) -> float:
    """The sigma below which the second network is asked."""
    found = read_config(path, "model_index.json").get("boundary_ratio")
    if not isinstance(found, float) or not 0 < found < 1:
        raise UserError(
            f"model.path = {path}: model_index.json has boundary_ratio = {shown(found)}; expected a number between 0 "
            "and 1, as in Wan 2.2 A14B; for one network set model.family = 'wan'"
        )
    return found
