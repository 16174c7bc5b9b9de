"""What `opd-ds merge` reads and writes: teachers on disk as what each adds to a base; a LoRA in diffusers' form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_ds.config.paths import find_local, resolve_path
from opd_ds.errors import UserError, about
from opd_ds.models import ModelFamily, lora
from opd_ds.models.adapter_config import exact_fields, scale
from opd_ds.models.adapter_files import adapter_parts
from opd_ds.models.inspection import inspect, network_folder, weight_files
from opd_ds.models.two_networks import of_part
from opd_ds.models.weight_files import Shapes, read_shapes
from opd_ds.utils.atomic_io import apply_umask

Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """A teacher as the user named it, and its weight."""

    name: str
    weight: float


def parse_sources(texts: list[str]) -> list[Source]:
    """`NAME[:WEIGHT]` each: what follows the last colon is a weight if it is a number; default 1/n.

    Raises:
        UserError: fewer than two, or a weight that is 0, not finite, or no number behind a path that exists.
    """
    if len(texts) < 2:
        raise UserError(f"sources = {texts}: merging needs at least two; name another teacher")
    sources = []
    for text in texts:
        name, _, tail = text.rpartition(":")
        try:
            weight = float(tail)
        except ValueError:
            if name and find_local(name, "source") and not find_local(text, "source"):
                raise UserError(f"source {text!r}: the weight {tail!r} is no number; expected NAME[:WEIGHT]") from None
            name, weight = text, 1 / len(texts)
        if not name or weight == 0 or not math.isfinite(weight):
            raise UserError(f"source {text!r}: expected NAME[:WEIGHT], the weight finite and not 0")
        sources.append(Source(name, weight))
    return sources


class Network:
    """A full checkpoint in a folder, with one network or several; each parameter is read when it is asked for.

    Attributes:
        shapes: of all parameters and buffers, by the names that the family gives them.
    """

    def __init__(self, path: Path, family: ModelFamily) -> None:
        self.path = path
        self.shapes: Shapes = {}
        self._place_of: dict[str, tuple[Any, str]] = {}
        several = len(family.networks) > 1
        for part in family.networks:
            names = weight_files(path / part if several else network_folder(path))
            prefix = f"{part}." if several else ""
            self.shapes |= {prefix + key: shape for key, shape in read_shapes(names).items()}
            for file in (safe_open(name, framework="pt") for name in names):
                self._place_of |= {prefix + key: (file, key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)

    def __getitem__(self, key: str) -> Tensor:
        """In float32."""
        file, name = self._place_of[key]
        found: Tensor = file.get_tensor(name).to(torch.float32)
        return found

    def delta(self, key: str, base: Tensor) -> Tensor:
        return self[key] - base


class SingleFile(Network):
    """A full checkpoint in one file, read whole when the first parameter is asked for: its layout may be another."""

    def __init__(self, path: Path, family: ModelFamily) -> None:
        family.check_compatible(path)
        self.path, self._family = path, family
        self.shapes = {key: tuple(value.shape) for key, value in family.empty_transformer().state_dict().items()}

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return self._family.load_transformer(self.path).state_dict()

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[key].to(torch.float32)


class Adapter:
    """A LoRA.

    Attributes:
        base: the base it names, if any.
        factors: A [r, in, ...] and scale * B [out, r, ...], float32, by the name of the weight they add to.
        shapes: of those weights.
    """

    def __init__(self, path: Path, pipeline_class: str) -> None:
        config, state = lora.read_adapter(path, pipeline_class)
        self.path = path
        self.base: str | None = config.base_model_name_or_path
        self.factors: Factors = {}
        for module in dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in sorted(state)):
            a, b = (state[f"{module}.lora_{part}.weight"].to(torch.float32) for part in "AB")
            self.factors[f"{module}.weight"] = a, scale(config, module) * b
        self.shapes: Shapes = {key: (b.shape[0], *a.shape[1:]) for key, (a, b) in self.factors.items()}

    def delta(self, key: str, base: Tensor) -> Tensor:
        """What it adds to `base`; zeros where it adapts nothing."""
        if key not in self.factors:
            return torch.zeros_like(base)
        a, b = self.factors[key]
        return (b.flatten(1) @ a.flatten(1)).reshape(base.shape)


def find_teacher(source: Source) -> tuple[Path, bool]:
    """Where it is, and whether it is a LoRA.

    Raises:
        UserError: nothing there, neither a LoRA nor a full checkpoint, or one that cannot be loaded.
    """
    path = resolve_path(source.name, "source")
    with about(f"source {source.name!r}"):
        found = inspect(path)
        found.refuse_problem()
    return path, found.is_adapter


def read_teacher(name: str, path: Path, family: type[ModelFamily], model: ModelFamily | None) -> Adapter | Network:
    """Read a LoRA whole, of a full checkpoint the names and shapes.

    Args:
        model: the base, which full checkpoints come with.

    Raises:
        UserError: a LoRA that is incomplete or adapts more than the network, or more or fewer networks than the family
            has, a checkpoint of another kind of network.
    """
    with about(f"source {name!r}"):
        if lora.is_adapter(path):
            _check_networks(path, family)
            return Adapter(path, family.pipeline_class)
        assert model is not None
        model.check_compatible(path)
        return SingleFile(path, model) if path.is_file() else Network(path, model)


def _check_networks(path: Path, family: type[ModelFamily]) -> None:
    """Raise UserError for a LoRA of two networks where the family has one, and the other way round."""
    of_two = bool(adapter_parts(path))
    if of_two == (len(family.networks) > 1):
        return
    if of_two:
        raise UserError("a LoRA of two networks, and --family has one; give --family wan_a14b")
    folders = " or ".join(f"{part}/" for part in family.networks)
    raise UserError(
        f"a LoRA of one network, and --family has two; put it into a folder {folders} and name the folder around it"
    )


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
            if not lora.same_base(teacher.base, base):
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


def write_loras(folder: Path, factors: Factors, base: str | None, family: type[ModelFamily]) -> None:
    """`write_lora`, in a folder of its own for each of a family's several networks that is adapted. These then have one
    rank, as `lora.read_adapter` wants it of them: what is added to a B is zero.
    """
    if len(family.networks) == 1:
        write_lora(folder, factors, base)
        return
    rank = max(len(a) for a, _ in factors.values())
    for part in family.networks:
        if own := of_part(factors, part):
            write_lora(folder / part, {key: _of_rank(pair, rank) for key, pair in own.items()}, base)


def _of_rank(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Rows of A are repeated, so that a student can train them."""
    a, b = pair
    times = -(-rank // len(a))
    more = torch.zeros(len(b), rank - len(a), *b.shape[2:])
    return a.repeat(times, *[1] * (a.ndim - 1))[:rank], torch.cat([b, more], dim=1)


def write_lora(folder: Path, factors: Factors, base: str | None) -> None:
    """`pytorch_lora_weights.safetensors` with its configuration inside, as diffusers and `lora.read_adapter` take it.

    Family.save_lora wants a base folder, which LoRAs are merged without; the file is the same for all families.

    Args:
        factors: A [r, in, ...] and B [out, r, ...] by the name of the weight that B A is added to.
        base: recorded, so that the merged LoRA is refused on another base as its sources are.
    """
    pairs = {key.removesuffix(".weight"): pair for key, pair in factors.items()}
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    config = exact_fields(ranks, ranks) | {"base_model_name_or_path": base}  # alpha = rank everywhere: scale 1
    tensors = {
        f"transformer.{module}.lora_{part}.weight": factor.contiguous()
        for module, pair in pairs.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / lora.DIFFUSERS_WEIGHTS, {"format": "pt", "lora_adapter_metadata": packed})
    apply_umask(folder / lora.DIFFUSERS_WEIGHTS)
