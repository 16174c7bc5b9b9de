"""Kernels that give the same bits every time."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Let torch choose deterministic kernels only, in this process; call it before CUDA is initialised.

    By default the backward of attention and sums by index add up in the order in which threads arrive. An operation
    that has no deterministic kernel raises RuntimeError and says so. Collectives of NCCL add in an order that depends
    on the number of GPUs and how they are connected, so the same bits need the same machine.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it with its first product
    torch.use_deterministic_algorithms(True)
    # Else every `torch.empty` is filled, which finds reads of what was never written and costs bandwidth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)  # the one attention for which torch has no deterministic backward
