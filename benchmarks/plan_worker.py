"""One configuration in processes of their own: rounds of it, and the most memory they took beyond the libraries.

python -m benchmarks.plan_worker CONFIG.yaml OUT.json ROUNDS     (RANK, WORLD_SIZE and so on as torchrun sets them)
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world
from opd_ds.config.loading import load_config, parse_config
from opd_ds.config.schema import RunConfig

if TYPE_CHECKING:
    from opd_ds.engine import Group


def main(config_file: str, out: str, rounds: int) -> None:
    """Rank 0 writes `out`: bytes on every rank, in the most expensive of the rounds and while loading."""
    world = detect_world()
    prepare_environment(world)
    config = load_config(None, Path(config_file), [])
    from opd_ds.engine import init_group
    from opd_ds.runs.setup import prepare
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    with init_group(world) as group:
        warm_up(config, group)
        baseline = baseline_memory(group)
        reset_peak(group)
        parts = prepare(config, group)
        loading = peak_memory(group) - baseline
        reset_peak(group)
        seconds = []
        for index in range(rounds):
            seconds.append(sum(parts.trainer.run_round(index).seconds.values()))
        peak = peak_memory(group) - baseline
        found = group.gather({"peak": peak, "loading": loading, "seconds": seconds[-1]})
        if world.is_main:
            Path(out).write_text(json.dumps({"device": group.device.type, "ranks": found}) + "\n", encoding="utf-8")


def warm_up(config: RunConfig, group: Group) -> None:
    """What libraries load and keep at their first use is theirs: a round of `config` with a tiny network."""
    import torch

    from opd_ds.runs.setup import prepare

    group.sum(torch.ones(1 << 21, device=group.device))
    with tempfile.TemporaryDirectory() as folder:
        # One for all: where there is a process group transformers 5 saves weights on rank 0 only.
        shared = Path(group.gather(folder)[0])
        if group.world.is_main:
            _write_tiny(config, shared)
        group.barrier()
        prepare(_tiny(config, shared), group).trainer.run_round(0)
        group.barrier()


def baseline_memory(group: Group) -> int:
    """Bytes that this process holds now."""
    import torch

    return _resident() if group.device.type == "cpu" else torch.cuda.memory_allocated()


def reset_peak(group: Group) -> None:
    """Measure peaks from now on."""
    if group.device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # see proc(5)
        return
    import torch

    torch.cuda.reset_peak_memory_stats()


def peak_memory(group: Group) -> int:
    """The most bytes since `reset_peak`."""
    if group.device.type == "cpu":
        return _status("VmHWM")
    import torch

    return torch.cuda.max_memory_allocated()


def _write_tiny(config: RunConfig, folder: Path) -> None:
    from opd_ds.testing.family_checks import tiny_module

    tiny_module(config.model.family).write(folder)


def _tiny(config: RunConfig, folder: Path) -> RunConfig:
    """The same run of the family's tiny pipeline; all its teachers are the base."""
    import torch

    from opd_ds.models import build_family

    name, base = config.model.family, folder
    side = 4 * build_family(name, base, dtype=torch.float32, device=torch.device("cpu")).size_unit
    data = config.model_dump(mode="json")
    data["model"] |= {"path": str(base), "height": side, "width": side, "text_encoders": "offload"}
    for task in data["tasks"].values():
        task["teacher"]["path"] = str(base)
    return parse_config(data)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def _resident() -> int:
    """Bytes of this process in memory, what the allocator holds back returned before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    os._exit(0)  # nothing is left to do; DeepSpeed's threads may take their time
