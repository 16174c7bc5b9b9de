"""A network's weights as they lie in safetensors files: opened by header, read tensor by tensor where they are wanted.

Files are mapped, not read: the kernel keeps one copy of their pages for all processes of a node, and only the pages of
elements that are asked for are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from opd_ds.errors import UserError
from opd_ds.models import privates
from opd_ds.models.provenance import sources_of
from opd_ds.models.weight_files import (
    DTYPES,
    NOT_TRANSFORMER,
    Shapes,
    read_header,
    refuse_other_shapes,
    stored_dtype,
)
from opd_ds.utils.progress import Work, work

# In the authors' files of Z-Image, which do not use it either; diffusers removes it.
_UNUSED = ("norm_final.weight",)


class StoredTensor(Tensor):
    """A tensor on the meta device that knows where its values are; functions of it are such tensors again.

    That way diffusers' converters of single files, which cut and join whole tensors, run without reading any.
    """

    _read: Callable[[], Tensor]
    sources: frozenset[str]  # the names, in the file, of what it is computed from

    @staticmethod
    def of(shape: Tensor, read: Callable[[], Tensor], names: frozenset[str] = frozenset()) -> StoredTensor:
        """Shaped as the meta tensor `shape`; `read` gives the values, on the CPU. `names` are its `sources`."""
        with torch._C.DisableTorchFunctionSubclass():  # as torch's documentation does it
            stored = shape.as_subclass(StoredTensor)
        stored._read, stored.sources = read, names
        return stored

    def read(self) -> Tensor:
        """The values on the CPU: where nothing has to be computed, the file's own pages."""
        return self._read()

    def elements(self, start: int, stop: int) -> Tensor:
        """Those from `start` to `stop` in the flattened tensor, on the CPU."""
        return self._read().reshape(-1)[start:stop]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__"):
            raise NotImplementedError(f"{name} would change weights in a file")
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **kwargs)
        names = sources_of((*args, *kwargs.values()))
        if isinstance(found, Tensor):
            return cls.of(found, partial(_evaluate, function, args, kwargs), names)
        if isinstance(found, (tuple, list)) and found and isinstance(found[0], Tensor):
            parts = [partial(_evaluate, function, args, kwargs, index) for index in range(len(found))]
            return type(found)(cls.of(part, read, names) for part, read in zip(found, parts, strict=True))
        return found  # a shape, a dtype


def _evaluate(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], index: int | None = None) -> Tensor:
    found = function(*_values(args), **{key: _values(value) for key, value in kwargs.items()})
    return found if index is None else found[index]


def _values(argument: Any) -> Any:
    if isinstance(argument, StoredTensor):
        return argument.read()
    return type(argument)(map(_values, argument)) if type(argument) in (tuple, list) else argument


Stored = dict[str, StoredTensor]


def open_weights(files: Iterable[Path]) -> Stored:
    """All tensors in `files`, by name.

    Raises:
        UserError: a file is no whole safetensors file, or holds other than floating-point numbers of 16 bits or more.
    """
    stored: Stored = {}
    for file in files:
        header = read_header(file)
        for name, tensor in _mapped(file, header).items():
            stored_dtype(name, header[name])
            stored[name] = tensor
    return stored


def _mapped(file: Path, header: dict[str, Any]) -> Stored:
    """All tensors of a file, of whatever type: which of them are wanted may not be known yet."""
    mapped = safe_open(file, framework="pt")
    return {
        name: StoredTensor.of(
            torch.empty(entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.uint8), device="meta"),
            partial(mapped.get_tensor, name),
            frozenset([name]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def open_single_file(file: Path, transformer_class: str, config: dict[str, Any], wanted: Collection[str]) -> Stored:
    """A whole network in one file, under diffusers' names.

    Args:
        file: the transformer alone or a whole model, in its authors' layout or with diffusers' names.
        transformer_class: name of the diffusers class.
        config: the network's configuration, as diffusers stores it.
        wanted: the names of that network's weights.

    Raises:
        UserError: not such a file, a quantized transformer, one with tensors that diffusers leaves out, or in a layout
            that diffusers does not convert for this class.
    """
    header = read_header(file)
    # A whole model has text encoders and a VAE beside it, which may be stored in any way.
    raw = {name: tensor for name, tensor in _mapped(file, header).items() if not name.startswith(NOT_TRANSFORMER)}
    found = raw if raw.keys() == set(wanted) else _renamed(raw, transformer_class, config, wanted)
    used = sources_of([tensor for name, tensor in found.items() if name in wanted])
    for name in sorted(used):
        stored_dtype(name, header[name])
    left_out = {name for name in raw.keys() - sources_of(list(found.values())) if not name.endswith(_UNUSED)}
    if left_out:
        raise UserError(
            f"{len(left_out)} of {len(raw)} tensors of its transformer are not read by diffusers' conversion to "
            f"{transformer_class}, the first: {min(left_out)!r}; it is another network"
        )
    return found


def _renamed(raw: Stored, transformer_class: str, config: dict[str, Any], wanted: Collection[str]) -> Stored:
    """Under diffusers' names, as far as they can be."""
    try:
        converted = _convert(dict(raw), transformer_class, config)
    except UserError:
        raise
    except Exception as error:  # the converters assume their layout and fail in as many ways as a file can differ
        if 2 * len(raw.keys() & set(wanted)) > len(wanted):  # diffusers' names, but not all of them
            return raw
        raise UserError(
            f"neither a LoRA nor a whole {transformer_class} in a layout that diffusers reads from one file; its first "
            f"key: {min(raw, default='-')!r}"
        ) from error
    return max(raw, converted, key=lambda stored: len(stored.keys() & set(wanted)))


def _convert(stored: Stored, transformer_class: str, config: dict[str, Any]) -> Stored:
    return privates.single_file_converter(transformer_class)(checkpoint=stored, config=config)


def shapes_of(stored: Stored) -> Shapes:
    """By name."""
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


class ParameterBuilder(Protocol):
    """Decides what of a parameter this process keeps, and where."""

    @property
    def device(self) -> torch.device:
        """Where the network computes; its buffers go there, whole."""

    def __call__(self, stored: StoredTensor, dtype: torch.dtype) -> nn.Parameter:
        """The parameter whose values are `stored`."""


class WholeParameters:
    """Every parameter whole on `device`. On a CPU and in the file's own dtype it is the file's pages until changed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, stored: StoredTensor, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(stored.read().to(self.device, dtype).contiguous())


class ParametersElsewhere:
    """None of them: shapes on the meta device, for weights that another process of the node keeps for this one."""

    device = torch.device("cpu")

    def __call__(self, stored: StoredTensor, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(stored.shape, dtype=dtype, device="meta"))


def fill(
    network: nn.Module,
    stored: Stored,
    build: ParameterBuilder,
    dtype: torch.dtype,
    source: Path,
    finish: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Give `network`, whose parameters are on meta, its weights in `dtype`, one after the other.

    diffusers leaves some layers in float32; DeepSpeed has one dtype for the weights of an engine. With one dtype
    everywhere a student that is its own teacher has loss 0. Stored buffers are of that dtype too, computed ones stay.

    Args:
        source: where they are from, for the log.
        finish: called with every module's name and the module, when it has its weights.

    Raises:
        UserError: a parameter is missing or of another shape.
    """
    aliases: dict[int, list[str]] = {}  # the names of a tied parameter; mostly one
    for name, parameter in network.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    sources = {id_: next((name for name in names if name in stored), names[0]) for id_, names in aliases.items()}
    wanted = {sources[id(parameter)]: tuple(parameter.shape) for parameter in network.parameters()}
    wanted |= {name: tuple(buffer.shape) for name, buffer in network.named_buffers() if name in stored}
    refuse_other_shapes(shapes_of({name: stored[name] for name in wanted if name in stored}), wanted, "the network")
    tied = {sources[id_] for id_, names in aliases.items() if len(names) > 1}
    with work(f"reading {source}", len(aliases), "weights") as reading:
        for name, module in _filled(network, stored, build, dtype, sources, tied, reading):
            if finish is not None:
                finish(name, module)


def _filled(
    network: nn.Module,
    stored: Stored,
    build: ParameterBuilder,
    dtype: torch.dtype,
    sources: dict[int, str],
    tied: set[str],
    reading: Work,
) -> Iterator[tuple[str, nn.Module]]:
    built: dict[str, nn.Parameter] = {}  # those that are needed again
    for prefix, owner in list(network.named_modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            source = sources[id(parameter)]
            if source in built:
                value = built[source]
            else:
                value = build(stored[source], dtype)
                reading.advance()
                if source in tied:
                    built[source] = value
            setattr(owner, name, value)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            key = f"{prefix}.{name}" if prefix else name
            table = stored[key].read() if key in stored else buffer
            setattr(owner, name, table.to(build.device, dtype if key in stored else None))
        yield prefix, owner


def lacks_tables(network: nn.Module, stored: Stored) -> bool:
    """Whether a network built on meta has buffers or other tensors, computed by its modules, that no file has."""
    for prefix, owner in network.named_modules():
        for name, value in (*owner.named_buffers(prefix, recurse=False), *vars(owner).items()):
            parts = value if isinstance(value, (tuple, list)) else [value]
            if name not in stored and any(isinstance(part, Tensor) for part in parts):
                return True
    return False
