"""Whole weights out of a sharded checkpoint, in one process and without an engine."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from opd_ds.engine.ema import ema_file
from opd_ds.engine.student import CHECKPOINT_TAG

_WHOLE = "mp_rank_00_model_states.pt"  # DeepSpeed's file of a run without ZeRO


def consolidated_weights(checkpoint: Path, zero_stage: int) -> dict[str, Tensor]:
    """The trained weights by name, whole, on the CPU: averaged where the run kept an EMA, fp32 masters otherwise.

    This is DeepSpeed's `get_fp32_state_dict_from_zero_checkpoint`, taken apart (0.19) where the EMA, which is sharded
    exactly as the masters are, has to go in. Frozen weights are not among them. The engine's files are pickles: open
    only checkpoints you trust.

    Args:
        checkpoint: a folder `round-NNNNNN`.
        zero_stage: as its `state.json` says.
    """
    averages = [
        torch.load(file, weights_only=True, map_location="cpu")["shards"]
        for rank in range(len(list(checkpoint.glob(ema_file("*")))))
        for file in [checkpoint / ema_file(rank)]
    ]
    if zero_stage == 0:
        return _without_zero(checkpoint / CHECKPOINT_TAG / _WHOLE, averages)
    return _from_shards(checkpoint / CHECKPOINT_TAG, averages)


def _without_zero(file: Path, averages: list[list[Tensor]]) -> dict[str, Tensor]:
    """Every rank held everything; the EMA lists the trained parameters in the module's order."""
    stored = torch.load(file, weights_only=False, map_location="cpu")
    weights: dict[str, Tensor] = stored["module"]
    if averages:
        trained = [name for name in weights if name not in stored["buffer_names"]]
        weights |= dict(zip(trained, averages[0], strict=True))
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _from_shards(folder: Path, averages: list[list[Tensor]]) -> dict[str, Tensor]:
    from deepspeed.utils import zero_to_fp32 as deepspeed_files

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints as it goes
        states = deepspeed_files.parse_model_states(deepspeed_files.get_model_state_files(str(folder)))
        optimizer_files = deepspeed_files.get_optim_files(str(folder))
        stage, world, shards, paddings = deepspeed_files.parse_optim_states(optimizer_files, str(folder))
        if averages:
            # Saved masters lack the padding that the last rank's shard has in memory.
            shards = [
                [mean.flatten()[: master.numel()] for mean, master in zip(means, masters, strict=True)]
                for means, masters in zip(averages, shards, strict=True)
            ]
        if stage == 3:
            merged = deepspeed_files._get_fp32_state_dict_from_zero3_checkpoint(world, shards, states, True)
        else:
            merged = deepspeed_files._get_fp32_state_dict_from_zero2_checkpoint(world, shards, states, True, paddings)
        return deepspeed_files.to_torch_tensor(merged)
