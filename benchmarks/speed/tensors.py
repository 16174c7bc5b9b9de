"""What tensors of a process hold."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def alive_bytes(others: Iterable[nn.Module], family: Any) -> int:
    """Bytes of all storages that live, but for those of other networks: teachers, text encoders, VAE."""
    pipeline, vae = family.loaded.encoders, family.loaded.vae
    parts = [part for part in (pipeline.components.values() if pipeline else ()) if isinstance(part, nn.Module)]
    known = {
        tensor.untyped_storage().data_ptr()
        for module in (*others, *parts, *filter(None, [vae]))
        for tensor in (*module.parameters(), *module.buffers())
    }
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at an object asks deprecated modules what they are
        tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    storages = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
