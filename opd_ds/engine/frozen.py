"""A frozen network under DeepSpeed ZeRO-3 without an optimizer: sharded, optionally held on host memory or NVMe."""

from __future__ import annotations

from typing import Any

from torch import nn

from opd_ds.engine.blocks import initialize


class FrozenEngine:
    """ZeRO-Inference for a teacher. Each forward is a collective over all ranks."""

    def __init__(self, module: nn.Module, ds_config: dict[str, Any]) -> None:
        module.requires_grad_(False)
        self._engine = initialize(module, ds_config)
        self._engine.eval()

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    @property
    def module(self) -> nn.Module:
        return self._engine.module
