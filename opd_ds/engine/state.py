"""What a resume needs, out of the engine and back into it, in terms that know neither ZeRO stage nor rank.

A tensor entry is keyed `kind/start/parameter`: the elements from `start` on of the flattened parameter, fp32, 1-D.
`kind` is `master`, a moment of the optimizer (`exp_avg`, ...), the name of a further copy of the weights, or
`waiting`: what a round will train on (`opd_ds.training.late`), where columns take the place of parameters and keep
their own dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_ds.engine import privates
from opd_ds.engine.fragments import Fragment, in_memory, moments
from opd_ds.engine.privates import inner_optimizer
from opd_ds.errors import DamagedCheckpointError
from opd_ds.utils.atomic_io import apply_umask
from opd_ds.utils.disk_errors import disk_error

MASTER, EMA, OLD_POLICY, START, WAITING = "master", "ema", "old_policy", "start", "waiting"
_NO_MOMENTS = {MASTER, EMA, OLD_POLICY, START, WAITING}
_GROUP_FIELDS = ("lr", "betas", "momentum")  # what schedules move


def entry(kind: str, fragment: Fragment) -> str:
    """The key of one tensor entry."""
    return f"{kind}/{fragment.start}/{fragment.name}"


def state_dict(engine: DeepSpeedEngine, owned: list[Fragment]) -> dict[str, Tensor]:
    """Masters and moments of the fragments, as copies on the CPU."""
    entries: dict[str, Tensor] = {}
    for fragment in owned:
        with in_memory(engine.optimizer, fragment, write=False):
            entries[entry(MASTER, fragment)] = _copy(fragment.master)
            for kind, value in moments(engine.optimizer, fragment.flat).items():
                if _is_moment(value, fragment):
                    entries[entry(kind, fragment)] = _copy(fragment.of(value))
    return entries


def load_state_dict(engine: DeepSpeedEngine, held: list[Fragment], shards: ShardReader, optimizer_step: int) -> None:
    """Fill masters and moments. The network's own weights are not touched: publish the masters afterwards.

    Raises:
        DamagedCheckpointError: a part of a parameter is in none of the files.
    """
    inner = inner_optimizer(engine.optimizer)
    by_flat: dict[int, list[Fragment]] = defaultdict(list)
    for fragment in held:
        by_flat[id(fragment.flat)].append(fragment)
    for parts in by_flat.values():
        with ExitStack() as stack:
            stack.enter_context(in_memory(engine.optimizer, parts[0], write=True))
            for part in parts:
                part.master.copy_(shards.read(MASTER, part.name, part.start, part.numel))
            kinds = shards.kinds - _NO_MOMENTS
            if not kinds:  # written before the first step (fp16 skips those that overflow): leave the optimizer alone
                continue
            flat = parts[0].flat
            state = inner.state[flat]  # made by this look-up where it is not there yet
            for kind in kinds:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat).detach()
                for part in parts:
                    part.of(state[kind]).copy_(shards.read(kind, part.name, part.start, part.numel))
            _set_step(inner, state, optimizer_step)


def scalar_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Step counts, learning rates, schedule and loss scale; equal on all ranks, fit for JSON."""
    inner = inner_optimizer(engine.optimizer)
    return {
        "engine": privates.counters(engine),
        "optimizer_step": _step(inner),
        "groups": [{name: group[name] for name in _GROUP_FIELDS if name in group} for group in inner.param_groups],
        "scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "loss_scaler": privates.loss_scale(engine),
    }


def load_scalar_state(engine: DeepSpeedEngine, saved: dict[str, Any]) -> None:
    """Put back what `scalar_state` gave; the optimizer's step count is set with its moments.

    What no schedule moves is as the run is configured now: `--allow-change` may have changed it.
    """
    privates.set_counters(engine, saved["engine"])
    if engine.lr_scheduler is not None and saved["scheduler"] is not None:
        for group, fields in zip(inner_optimizer(engine.optimizer).param_groups, saved["groups"], strict=True):
            group |= {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        engine.lr_scheduler.load_state_dict(saved["scheduler"])
    privates.set_loss_scale(engine, saved["loss_scaler"])


def _copy(view: Tensor) -> Tensor:
    return view.to("cpu", torch.float32, copy=True)


def _is_moment(value: Any, fragment: Fragment) -> bool:
    return isinstance(value, Tensor) and value.numel() == fragment.flat.numel() and value.dim() > 0


def _step(inner: Any) -> int:
    """Updates done: torch keeps the count per tensor, DeepSpeed's CPU Adam too, its fused Adam per group."""
    counts = [state["step"] for state in inner.state.values() if "step" in state]
    counts += [group["step"] for group in inner.param_groups if "step" in group]
    return max((int(count) for count in counts), default=0)


def _set_step(inner: Any, state: dict[str, Any], step: int) -> None:
    if type(inner).__module__.startswith("torch.optim"):
        state["step"] = torch.tensor(float(step))
    else:
        state["step"] = step
        for group in inner.param_groups:
            group["step"] = step


# ---- files ----


def write_shard(entries: dict[str, Tensor], folder: Path, rank: int, size: int) -> Path:
    """This rank's entries as one safetensors file; returns it.

    Raises:
        OSError: as the disk does.
    """
    file = folder / f"shard-{rank:05d}-of-{size:05d}.safetensors"
    try:
        save_file(entries, file)
        apply_umask(file)
    except SafetensorError as error:
        disk = disk_error(error, file)
        if disk is None:
            raise
        raise disk from error
    return file


class ShardReader:
    """Any stretch of any parameter out of the shard files of a checkpoint, however many ranks wrote them.

    Raises:
        DamagedCheckpointError: a file is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = defaultdict(list)
        for file in sorted(folder.glob("shard-*.safetensors")):
            try:
                opened = safe_open(file, framework="pt")
                for key in opened.keys():  # noqa: SIM118  # not a dict
                    kind, start, name = key.split("/", 2)
                    (numel,) = opened.get_slice(key).get_shape()
                    self._entries[kind, name].append((int(start), numel, key, opened))
            except Exception as error:  # safetensors raises its own kinds, and ValueError for what is not ours
                raise DamagedCheckpointError(f"{file}: not a whole shard ({error})") from error
        self.kinds = {kind for kind, _ in self._entries}

    def parameters(self) -> list[str]:
        return sorted({name for _, name in self._entries})

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of the flattened parameter: float32 [numel] on the CPU.

        Raises:
            DamagedCheckpointError: some of them are in no file.
        """
        result = torch.empty(numel)
        found = 0
        for first, last, piece in self._pieces(kind, name, start, start + numel):
            result[first - start : last - start] = piece
            found += last - first
        if found != numel:
            raise DamagedCheckpointError(
                f"{self._folder}: {kind} of {name!r} has {found} of the elements {start} to {start + numel}"
            )
        return result

    def _pieces(self, kind: str, name: str, start: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        for begin, numel, key, opened in self._entries.get((kind, name), []):
            first, last = max(start, begin), min(end, begin + numel)
            if first < last:
                yield first, last, opened.get_slice(key)[first - begin : last - begin]
