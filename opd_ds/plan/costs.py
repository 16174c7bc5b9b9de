"""What is read or measured once of a run, whatever setting is planned: sizes, costs of passes, ds_configs."""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_ds.config.paths import PACKAGE_PREFIX, resolve_ds_config, resolve_path
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import LoraSection
from opd_ds.config.teachers import QuantizedAs
from opd_ds.engine import NetworkSizes, read_ds_config
from opd_ds.errors import about
from opd_ds.models import block_names
from opd_ds.models.inspection import has_weights, inspect
from opd_ds.models.quantization import saved_bytes
from opd_ds.models.weight_files import read_shapes
from opd_ds.plan.inputs import network_inputs, squared_sum
from opd_ds.plan.metering import Cost, Meter, forward_cost, held_tensors, training_cost
from opd_ds.plan.network import Counts, Model, count, student_network


class Costs:
    """Measured costs of the run's networks by batch; each is measured once. Between batches they are straight lines
    through two measured ones.
    """

    _MEASURED = (1, 2)

    def __init__(self, model: Model, config: RunConfig) -> None:
        self.model, self._settings, self._sharing = model, config.student, config.model.sequence_parallel
        self._found: dict[tuple[str, bool, int], Cost] = {}
        self._counts: dict[tuple[LoraSection | None, float], Counts] = {}
        self._adapters: dict[str, int | None] = {}
        self._ds_configs: dict[str, tuple[dict[str, Any], str]] = {}

    def student(self, threshold: float = 0) -> Counts:
        """Elements of the student; `threshold` as for `count`."""
        return self._count(self._settings.lora if self._settings.kind == "lora" else None, threshold)

    def base(self, threshold: float = 0) -> Counts:
        """Elements of a full checkpoint."""
        return self._count(None, threshold)

    @cached_property
    def student_sizes(self) -> NetworkSizes:
        """What "auto" sizes of the student's ds_config follow."""
        return NetworkSizes.of(self.network)

    @cached_property
    def base_sizes(self) -> NetworkSizes:
        """The same of a full checkpoint that is not trained."""
        return NetworkSizes.of(self.model.network().requires_grad_(False))

    @cached_property
    def streamed(self) -> int:
        """Elements of a full checkpoint that are on the device at once where its blocks come one by one: two blocks,
        and all that is in none.
        """
        network = self.model.network()
        sizes = sorted(count(network.get_submodule(name)).parameters for name in block_names(network))
        return self.base().parameters - sum(sizes) + sum(sizes[-2:])

    def saved(self, quantize: QuantizedAs | None) -> float:
        """Bytes that the weights of a full checkpoint lose as `quantize`."""
        return saved_bytes(self.model.network(), quantize) if quantize else 0.0

    def ds_config(self, value: str, key: str) -> tuple[dict[str, Any], str]:
        """A ds_config as it is written, and where; read once. `key` names it in errors."""
        if value not in self._ds_configs:
            path = resolve_ds_config(value, key)
            self._ds_configs[value] = read_ds_config(path), str(path)
        return self._ds_configs[value]

    def on_disk(self, path: str) -> bool:
        """Whether a teacher's weights can be looked at."""
        return path.startswith(PACKAGE_PREFIX) or Path(path).expanduser().exists()

    def adapter(self, path: str) -> int | None:
        """Elements of the LoRA at `path`, None for a full checkpoint. What is not on disk is a LoRA of the student's
        rank when its name says so.
        """
        if path not in self._adapters:
            self._adapters[path] = self._read_adapter(path)
        return self._adapters[path]

    def _read_adapter(self, path: str) -> int | None:
        if not self.on_disk(path):
            named = "lora" in path.lower() or "adapter" in path.lower()
            return self._count(LoraSection(rank=self._settings.lora.rank), 0).trained if named else None
        place = resolve_path(path, "teacher.path")
        found = inspect(place)
        if has_weights(place):
            with about(f"teacher.path = {path!r}"):
                found.refuse_problem()
        if not found.is_adapter:
            return None
        return sum(map(prod, read_shapes(file for file in found.files if file.suffix == ".safetensors").values()))

    def _count(self, adapter: LoraSection | None, threshold: float) -> Counts:
        key = (adapter, threshold)
        if key not in self._counts:
            self._counts[key] = count(self.model.network(adapter), threshold)
        return self._counts[key]

    def forward(self, batch: int) -> Cost:
        """Without gradient, on one rank of those that share sequences."""
        return self._line("forward", False, batch).divided(self._sharing)

    def train(self, batch: int, *, checkpointing: bool) -> Cost:
        """Forward and backward, on one rank of those that share sequences."""
        return self._line("train", checkpointing, batch).divided(self._sharing)

    def decode(self, batch: int) -> Cost:
        """Latents to images."""
        return self._line("decode", False, batch)

    @cached_property
    def encode_pictures(self) -> Cost:
        """A prompt's reference pictures to latents, one after the other."""
        family, found = self.model.family, []
        for width, height in self.model.pictures:
            pixels = torch.empty(1, 3, height, width, dtype=family.dtype, device="meta")
            with torch.no_grad(), Meter([*self._vae.parameters(), *self._vae.buffers(), pixels]) as meter:
                latents = family.encode_picture_with(self._vae, pixels)
                found.append(Cost(meter.flops, meter.peak, meter.now, meter.operations))
                del latents
        return Cost(
            sum(cost.flops for cost in found),
            max((cost.peak for cost in found), default=0),
            sum(cost.saved for cost in found),
            sum(cost.operations for cost in found),
        )

    def inputs(self, batch: int) -> int:
        """Bytes of what one forward takes."""
        return batch * _nbytes(self._first)

    @cached_property
    def prompt(self) -> int:
        """Bytes of one encoded prompt."""
        names = ("encoder_hidden_states", "pooled_projections", "cap_feats")
        return _nbytes([value for name, value in self._first.items() if name in names])

    @cached_property
    def _first(self) -> dict[str, Any]:
        return self._inputs(1)

    @cached_property
    def network(self) -> nn.Module:
        return student_network(self.model, self._settings)

    @cached_property
    def _vae(self) -> nn.Module:
        return self.model.vae()

    def _line(self, kind: str, checkpointing: bool, batch: int) -> Cost:
        (low, high) = self._MEASURED
        if batch in self._MEASURED:
            return self._measured(kind, checkpointing, batch)
        first, second = (self._measured(kind, checkpointing, size) for size in (low, high))
        return first.at(low, second, high, batch)

    def _measured(self, kind: str, checkpointing: bool, batch: int) -> Cost:
        key = (kind, checkpointing, batch)
        if key not in self._found:
            self._found[key] = self._measure(kind, checkpointing, batch)
        return self._found[key]

    def _measure(self, kind: str, checkpointing: bool, batch: int) -> Cost:
        if kind == "decode":
            return self._decode(batch)
        network = self.network
        (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()  # type: ignore[operator]
        inputs = self._inputs(batch)
        return forward_cost(network, inputs) if kind == "forward" else training_cost(network, inputs, squared_sum)

    def _inputs(self, batch: int) -> dict[str, Any]:
        model, family = self.model, self.model.family
        config = model.configs["transformer"]
        shapes = family.latent_shape, batch, model.tokens, family.dtype, model.references
        inputs = network_inputs(model.transformer_class, config, *shapes)
        return inputs if family.boundary is None else {**inputs, "stage": 0}

    def _decode(self, batch: int) -> Cost:
        family = self.model.family
        latents = torch.empty(batch, *family.latent_shape, dtype=family.dtype, device="meta")
        with torch.no_grad(), Meter([*self._vae.parameters(), *self._vae.buffers(), latents]) as meter:
            pictures = family.decode_with(self._vae, latents)
            saved = meter.now
            del pictures
        return Cost(meter.flops, meter.peak, saved, meter.operations)


def _nbytes(inputs: Any) -> int:
    return sum(tensor.nbytes for tensor in held_tensors(inputs))
