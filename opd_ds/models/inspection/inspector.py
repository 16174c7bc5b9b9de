"""What a name stands for when weights are wanted: a pipeline, a network, a LoRA, one file, or something else.

Only headers and configurations are read, whatever the size of the weights. Who loads weights asks here first; what is
loaded and what was looked at are the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import ClassVar, Protocol

from opd_ds.errors import UserError
from opd_ds.models.adapter_config import lora_config
from opd_ds.models.adapter_files import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    adapter_parts,
    is_adapter,
    recorded_fields,
)
from opd_ds.models.adapter_keys import does_nothing_at_zero, form_of, is_factor, of_text_encoder, other_kind, partners
from opd_ds.models.inspection.parts import (
    CONFIG,
    NETWORK_WEIGHTS,
    WEIGHT_SUFFIXES,
    Part,
    look_at_network,
    look_at_other,
    read_config,
)
from opd_ds.models.two_networks import PARTS
from opd_ds.models.weight_files import NOT_TRANSFORMER, read_header, stored_dtype

TRANSFORMER = "transformer"
_LORA, _PIPELINE = "LoRA", "diffusers pipeline"
PIPELINE_INDEX = "model_index.json"
_WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")  # in the names of classes
_RUN_STATE = ("state.json", "manifest.json")  # of a checkpoint
_SIGNS = (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, PIPELINE_INDEX, CONFIG, TRANSFORMER)  # of something that can be named
_PICKLED_ADAPTERS = ("adapter_model.bin", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class Inspection:
    """What is at `path`.

    Attributes:
        kind: for people: `diffusers pipeline`, `PEFT folder`, `single file`, ...
        details: more of it: types, ranks, the base that it names.
        parts: of a pipeline, the transformer first; of a network its one folder; else empty.
        files: what is loaded when it is named as a teacher, start or source.
        ignored: what is there and not used then.
        problem: why it is refused there.
    """

    path: Path
    kind: str
    details: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    files: tuple[Path, ...] = ()
    ignored: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def is_adapter(self) -> bool:
        return self.kind == _LORA

    @property
    def is_pipeline(self) -> bool:
        return self.kind == _PIPELINE

    def refuse_problem(self) -> None:
        """Raise UserError where it cannot be loaded as a teacher, start or source."""
        if self.problem is not None:
            raise UserError(self.problem)


def inspect(path: Path) -> Inspection:
    """Look at a file or folder that exists; problems are in the result."""
    try:
        if parts := adapter_parts(path):
            return _two_adapters(path, {part: _adapter(folder) for part, folder in parts.items()})
        if is_adapter(path):
            return _adapter(path)
        return _single_file(path) if path.is_file() else _folder(path)
    except UserError as error:
        return Inspection(path, "unreadable", problem=str(error))


class Family(Protocol):
    """What is asked of a model family."""

    pipeline_class: ClassVar[str]
    pipeline_parts: ClassVar[Mapping[str, None]]
    networks: ClassVar[tuple[str, ...]]


def check_base(path: Path, family: type[Family] | None) -> None:
    """Refuse a base folder of which a part that is loaded is missing, damaged, quantized or in another form.

    Args:
        family: None: every part is taken to be loaded.

    Raises:
        UserError: the first problem.
    """
    found = inspect(path)
    if found.is_pipeline:
        used = {*(family.networks if family else ()), "vae", "scheduler"}
        for part in found.parts:
            unused = family is not None and part.name not in used and part.name in family.pipeline_parts
            if part.problem is not None and not unused:
                raise UserError(part.problem)
        if not (path / PIPELINE_INDEX).is_file():
            raise UserError(f"{path}: no {PIPELINE_INDEX}, which names the parts of a diffusers folder; copy it")
        return
    found.refuse_problem()
    raise UserError(f"a {found.kind}; expected a diffusers folder ({PIPELINE_INDEX}, {TRANSFORMER}/, vae/, ...)")


def has_weights(path: Path) -> bool:
    """Whether there is more than configurations, which are enough to plan a run."""
    if path.is_file():
        return True
    folders = (path, path / TRANSFORMER)
    return any(file.suffix in WEIGHT_SUFFIXES for folder in folders if folder.is_dir() for file in folder.iterdir())


def network_folder(path: Path) -> Path:
    """Where the network of a checkpoint folder is: `path/transformer` where there is one."""
    return path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path


# ---- adapters ----


def _adapter(path: Path) -> Inspection:
    if path.is_dir() and all((path / name).is_file() for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)):
        raise UserError(f"{path} holds two LoRAs, {PEFT_WEIGHTS} and {DIFFUSERS_WEIGHTS}; name one of the files")
    if path.is_dir() and (path / TRANSFORMER).is_dir():
        raise UserError(f"{path} holds a LoRA and a {TRANSFORMER}/; name the file of the former, or the latter")
    file = path if path.is_file() else path / (PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else DIFFUSERS_WEIGHTS)
    header = read_header(file)
    keys = [key for key in header if key != "__metadata__"]
    fields, where = recorded_fields(file)
    ranks = sorted({header[first]["shape"][0] for first, _ in partners(keys).values() if header[first]["shape"]})
    shown = " to ".join(dict.fromkeys(str(rank) for rank in (ranks[:1] + ranks[-1:])))
    details = {"form": form_of(keys), "rank": shown or "-"}
    if fields is not None:
        config = lora_config(fields, where)
        details |= {"alpha": f"{config.lora_alpha:g}", "base": str(config.base_model_name_or_path)}
    elif any(key.endswith(".alpha") for key in keys):
        details["alpha"] = "keys of its own"
    else:
        details["alpha"] = "not recorded, so the rank"
    details["types"] = " and ".join(sorted({header[key]["dtype"] for key in keys}))
    for key in sorted(keys):
        kind = other_kind(key)
        if kind and not does_nothing_at_zero(key):
            raise UserError(f"{file.name}: holds {kind} ({key!r}); allowed are plain LoRAs, merge it elsewhere")
    if not any(map(is_factor, keys)):
        raise UserError(f"{file.name}: holds no LoRA; its first key: {min(keys, default='-')!r}")
    beside = (file.with_name(PEFT_CONFIG),) if where == PEFT_CONFIG else ()
    encoders = [key for key in keys if of_text_encoder(key)]
    ignored = (f"{len(encoders)} keys for text encoders, if they are zero",) if encoders else ()
    return Inspection(path, _LORA, details, files=(*beside, file), ignored=ignored)


def _two_adapters(path: Path, found: dict[str, Inspection]) -> Inspection:
    details = {f"{part}: {key}": value for part, one in found.items() for key, value in one.details.items()}
    files, ignored = (tuple(chain(*(getattr(one, key) for one in found.values()))) for key in ("files", "ignored"))
    return Inspection(path, _LORA, details, files=files, ignored=ignored)


# ---- networks ----


def _single_file(path: Path) -> Inspection:
    header = read_header(path)
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        raise UserError(f"{path} holds no tensors; copy or download it again")
    others = [key for key in keys if key.startswith(NOT_TRANSFORMER)]
    used = [key for key in keys if not key.startswith(NOT_TRANSFORMER)]
    for key in used:
        stored_dtype(key, header[key])
    details = {"tensors": str(len(used)), "types": " and ".join(sorted({header[key]["dtype"] for key in used}))}
    prefixes = sorted({key.split(".")[0] for key in others})
    ignored = tuple(f"{sum(key.startswith(f'{one}.') for key in others)} tensors {one}.*" for one in prefixes)
    return Inspection(path, "single file", details, files=(path,), ignored=ignored)


def _folder(path: Path) -> Inspection:
    if all((path / name).is_file() for name in _RUN_STATE):
        raise UserError(f"{path} is a checkpoint of a run; name the model that `opd-ds export {path} OUT` writes")
    if (path / TRANSFORMER).is_dir() or (path / PIPELINE_INDEX).is_file():
        return _pipeline(path)
    if (path / CONFIG).is_file() or any(path.glob(f"{NETWORK_WEIGHTS.split('.')[0]}*")):
        part = look_at_network(path, path.name)
        details = {"network": part.kind}
        return Inspection(path, "network folder", details, (part,), part.files, part.ignored, part.problem)
    raise UserError(_nothing_here(path))


def _pipeline(path: Path) -> Inspection:
    transformer = look_at_network(path / TRANSFORMER, TRANSFORMER)
    parts, details = [transformer], {TRANSFORMER: transformer.kind}
    if (path / PIPELINE_INDEX).is_file():
        index = read_config(path, PIPELINE_INDEX)
        details = {"pipeline": str(index.get("_class_name")), **details}
        for name, loaded_by in sorted(index.items()):
            if isinstance(loaded_by, list) and len(loaded_by) == 2 and loaded_by[0] and name != TRANSFORMER:
                parts.append(_part(path / name, name, *map(str, loaded_by)))
    networks = [part for part in parts if part.name in PARTS]  # a second one is loaded with the first
    left = tuple(f"{part.name}/" for part in parts if part not in networks)
    files, ignored = (tuple(chain(*(getattr(part, key) for part in networks))) for key in ("files", "ignored"))
    problem = next((part.problem for part in networks if part.problem is not None), None)
    return Inspection(path, _PIPELINE, details, tuple(parts), files, (*ignored, *left), problem)


def _part(folder: Path, name: str, library: str, its_class: str) -> Part:
    if any(kind in its_class for kind in _WITHOUT_WEIGHTS):
        return look_at_other(folder, name)
    return look_at_network(folder, name, library)


def _nothing_here(path: Path) -> str:
    """Why a folder is no model, and where one is."""
    said = f"{path}: neither a LoRA nor a checkpoint"
    if (path / "checkpoints").is_dir():
        export = path / "export"
        advice = f"name {export}" if export.is_dir() else "make a model of a checkpoint in it with `opd-ds export`"
        return f"{path} is the output folder of a run; {advice}"
    if pickled := [name for name in _PICKLED_ADAPTERS if (path / name).is_file()]:
        return f"{path}: {pickled[0]} is a pickle of torch; only safetensors files are read, convert it"
    if (path / PEFT_CONFIG).is_file():
        return f"{path}: {PEFT_CONFIG} without {PEFT_WEIGHTS}; copy or download it"
    inside = sorted(path.iterdir()) if path.is_dir() else []
    files = [file.name for file in inside if file.suffix == ".safetensors" and file.is_file()]
    folders = [one.name for one in inside if one.is_dir() and any((one / name).exists() for name in _SIGNS)]
    if named := files + [f"{name}/" for name in folders]:
        return f"{said} by itself, but it holds {', '.join(named[:5])}: name {path / named[0]}"
    if others := [file.name for file in inside if file.suffix in WEIGHT_SUFFIXES]:
        return f"{said}; {others[0]} is not read, only safetensors files are"
    return f"{said} (no {PEFT_WEIGHTS}, {DIFFUSERS_WEIGHTS} or {TRANSFORMER}/{CONFIG}); name a model's folder or file"
