"""Activations that wait on the host from forward to backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from opd_ds.models.quantization import stored_tensors


class OffloadedActivations(save_on_cpu):
    """Inside, what autograd keeps of a forward of `network` goes to pinned memory of the host, but for its weights.

    With gradient checkpointing these are the inputs of blocks. The values are the same: so are the gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(pin_memory=True)
        pack, unpack = self.pack_hook, self.unpack_hook
        weights = {place for tensor in (*network.parameters(), *network.buffers()) for place in _storages(tensor)}

        def keep(tensor: Tensor) -> Any:
            return tensor if weights.issuperset(_storages(tensor)) else pack(tensor)

        def give(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else unpack(kept)

        self.pack_hook, self.unpack_hook = keep, give


def _storages(tensor: Tensor) -> Iterator[int]:
    """Where its numbers are; a quantized weight has none itself, but in the tensors that it consists of."""
    for plain in stored_tensors(tensor) if hasattr(tensor, "__tensor_flatten__") else (tensor,):
        yield plain.untyped_storage().data_ptr()
