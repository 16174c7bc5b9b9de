"""Activations that wait on the host from forward to backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu


class OffloadedActivations(save_on_cpu):
    """Inside, what autograd keeps of a forward of `network` goes to pinned memory of the host, but for its weights.

    With gradient checkpointing these are the inputs of blocks. The values are the same: so are the gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(pin_memory=True)
        pack, unpack = self.pack_hook, self.unpack_hook
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}

        def keep(tensor: Tensor) -> Any:
            return tensor if tensor.untyped_storage().data_ptr() in weights else pack(tensor)

        def give(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else unpack(kept)

        self.pack_hook, self.unpack_hook = keep, give
