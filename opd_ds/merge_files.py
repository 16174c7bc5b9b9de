"""What `opd-ds merge` reads and writes: teachers on disk as what each adds to a base; a LoRA in diffusers' form."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.loading import resolve_path
from opd_ds.models import lora

_NETWORK = "diffusion_pytorch_model.safetensors"
Shapes = dict[str, tuple[int, ...]]
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """A teacher as the user named it, and its weight."""

    name: str
    weight: float


def parse_sources(texts: list[str]) -> list[Source]:
    """`NAME[:WEIGHT]` each: what follows the last colon is a weight if it is a number; default 1/n.

    Raises:
        UserError: fewer than two, or a weight that is 0 or not finite.
    """
    if len(texts) < 2:
        raise UserError(f"sources = {texts}: merging needs at least two; name another teacher")
    sources = []
    for text in texts:
        name, _, tail = text.rpartition(":")
        try:
            weight = float(tail)
        except ValueError:
            name, weight = text, 1 / len(texts)
        if not name or weight == 0 or not math.isfinite(weight):
            raise UserError(f"source {text!r}: expected NAME[:WEIGHT], the weight finite and not 0")
        sources.append(Source(name, weight))
    return sources


class Network:
    """A full checkpoint; each parameter is read when it is asked for.

    Attributes:
        shapes: of all parameters and buffers, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        index = folder / f"{_NETWORK}.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {_NETWORK}
        if lacking := sorted(name for name in names if not (folder / name).is_file()):
            raise UserError(
                f"{path}: neither a LoRA nor a full checkpoint (no {lora.PEFT_WEIGHTS}, {lora.DIFFUSERS_WEIGHTS} or "
                f"{(folder / lacking[0]).relative_to(path)}); a run's checkpoint becomes one with `opd-ds export`"
            )
        files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        self.shapes: Shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in self._file_of.items()}

    def __getitem__(self, key: str) -> Tensor:
        """In float32."""
        return self._file_of[key].get_tensor(key).to(torch.float32)

    def delta(self, key: str, base: Tensor) -> Tensor:
        return self[key] - base


class Adapter:
    """A LoRA.

    Attributes:
        base: the base it names, if any.
        factors: A [r, in, ...] and scale * B [out, r, ...], float32, by the name of the weight they add to.
        shapes: of those weights.
    """

    def __init__(self, path: Path) -> None:
        config, state = lora.read_adapter(path)
        state = lora.strip_adapter_name(state)
        self.path = path
        self.base: str | None = config.base_model_name_or_path
        self.factors: Factors = {}
        for module in sorted({key.rsplit(".lora_", 1)[0] for key in state}):
            if module.startswith("text_encoder"):
                raise UserError(f"{path}: adapts {module!r} too; only LoRAs of the denoising network can be merged")
            a, b = (state.get(f"{module}.lora_{part}.weight") for part in "AB")
            rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
            if a is None or b is None or not a.shape[0] == b.shape[1] == rank:
                found = " and ".join("no" if factor is None else str(tuple(factor.shape)) for factor in (a, b))
                raise UserError(f"{path}: {module!r} has {found} for lora_A and lora_B, its config says rank {rank}")
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            self.factors[f"{module}.weight"] = a, scale * b
        self.shapes: Shapes = {key: (b.shape[0], *a.shape[1:]) for key, (a, b) in self.factors.items()}

    def delta(self, key: str, base: Tensor) -> Tensor:
        """What it adds to `base`; zeros where it adapts nothing."""
        if key not in self.factors:
            return torch.zeros_like(base)
        a, b = self.factors[key]
        return (b.flatten(1) @ a.flatten(1)).reshape(base.shape)


def read_teacher(source: Source) -> Adapter | Network:
    """Find it, and read a LoRA whole, of a full checkpoint the names and shapes.

    Raises:
        UserError: nothing there, neither of the two, or a LoRA that is incomplete or adapts more than the network.
    """
    path = resolve_path(source.name, "source")
    return Adapter(path) if lora.is_adapter(path) else Network(path)


def refuse_strangers(
    names: list[str], teachers: list[Adapter | Network], base: str | None, network: Network | None, *, trust_base: bool
) -> None:
    """Check that the teachers belong to one base.

    Args:
        base: its name, and `network` its weights; None when all are LoRAs, which are then held against each other.
        trust_base: do not compare the names of bases.

    Raises:
        UserError: a LoRA names another base; a weight has another shape or is missing, naming the first.
    """
    known: Shapes = dict(network.shapes) if network else {}
    for name, teacher in zip(names, teachers, strict=True):
        if isinstance(teacher, Adapter) and teacher.base and not trust_base:
            base = base or teacher.base
            if _last_part(teacher.base) != _last_part(base):
                raise UserError(
                    f"source {name!r}: the LoRA was trained on base {teacher.base!r}, the rest belongs to {base!r}; if "
                    "these are one model under two names, give --trust-base"
                )
        for key, shape in sorted(teacher.shapes.items()):
            wanted = known.get(key) if network else known.setdefault(key, shape)
            if wanted != shape:
                raise UserError(
                    f"source {name!r}: {key!r} has shape {shape}, in {'the base' if network else 'another source'} it "
                    f"is {wanted or 'absent'}; only teachers that were made from one base can be merged"
                )
        missing = sorted(known.keys() - teacher.shapes.keys()) if isinstance(teacher, Network) else []
        if missing:
            raise UserError(f"source {name!r}: lacks {len(missing)} weights of the base, the first: {missing[0]!r}")


def _last_part(base: str) -> str:
    """A hub id, its local copy and `package:<path>` name one base."""
    return base.rstrip("/").split("/")[-1].split(":")[-1]


def write_lora(folder: Path, factors: Factors, base: str | None) -> None:
    """`pytorch_lora_weights.safetensors` with its configuration inside, as diffusers and `lora.read_adapter` take it.

    Family.save_lora wants a base folder, which LoRAs are merged without; the file is the same for all families.

    Args:
        factors: A [r, in, ...] and B [out, r, ...] by the name of the weight that B A is added to.
        base: recorded, so that the merged LoRA is refused on another base as its sources are.
    """
    pairs = {key.removesuffix(".weight"): pair for key, pair in factors.items()}
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Patterns are regular expressions that otherwise match the end of a name.
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    # alpha = rank everywhere: scale 1.
    config = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    config |= {"target_modules": list(pairs), "base_model_name_or_path": base}
    tensors = {
        f"transformer.{module}.lora_{part}.weight": factor.contiguous()
        for module, pair in pairs.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / lora.DIFFUSERS_WEIGHTS, {"format": "pt", "lora_adapter_metadata": packed})
