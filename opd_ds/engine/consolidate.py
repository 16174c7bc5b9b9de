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
    return _from_shards(checkpoint / CHECKPOINT_TAG, zero_stage, averages)


def _without_zero(file: Path, averages: list[list[Tensor]]) -> dict[str, Tensor]:
    """Every rank held everything; the EMA lists the trained parameters in the module's order."""
    stored = torch.load(file, weights_only=False, map_location="cpu")
    weights: dict[str, Tensor] = stored["module"]
    if averages:
        trained = [name for name in weights if name not in stored["buffer_names"]]
        weights |= dict(zip(trained, averages[0], strict=True))
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _from_shards(folder: Path, zero_stage: int, averages: list[list[Tensor]]) -> dict[str, Tensor]:
    from deepspeed.checkpoint import constants
    from deepspeed.utils import zero_to_fp32 as deepspeed_files

    key = constants.FP32_FLAT_GROUPS if zero_stage == 3 else constants.SINGLE_PARTITION_OF_FP32_GROUPS
    # Not DeepSpeed's own reader of these files, which refuses those of bf16 at stage 1.
    stored = [
        torch.load(file, weights_only=False, map_location="cpu", mmap=True)[constants.OPTIMIZER_STATE_DICT]
        for file in deepspeed_files.get_optim_files(str(folder))
    ]
    shards = [part[key] for part in stored]
    if averages:
        # Saved masters may lack the padding that the last rank's shard has in memory.
        shards = [
            [mean.flatten()[: master.numel()] for mean, master in zip(means, masters, strict=True)]
            for means, masters in zip(averages, shards, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        states = deepspeed_files.parse_model_states(deepspeed_files.get_model_state_files(str(folder)))
        if zero_stage == 3:
            merged = deepspeed_files._get_fp32_state_dict_from_zero3_checkpoint(len(shards), shards, states, True)
        else:
            paddings = stored[0].get(constants.PARAM_ALIGNMENT_PADDINGS)
            merged = deepspeed_files._get_fp32_state_dict_from_zero2_checkpoint(
                len(shards), shards, states, True, paddings
            )
        return deepspeed_files.to_torch_tensor(merged)
