"""What a checkpoint costs a run: how long a round waits for it, written at once and written in the background.

    python -m benchmarks checkpoint-cost --millions 50 --folder runs/checkpoint_cost

States of a student of so many million parameters (masters, two moments, average: 16 bytes each) on one rank. Medians of
interleaved saves; the ratio is what `run.checkpoint_in_background` brings.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path

import torch

from opd_ds.checkpoint.store import CheckpointStore
from opd_ds.cluster.world import World
from opd_ds.engine import init_group

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def bench(millions: int, folder: Path, repeats: int) -> None:
    """Print the result as JSON; `folder` is removed in the end."""
    group = init_group(World())
    state = {f"{kind}/0/block{i}.weight": torch.randn(1_000_000) for kind in KINDS for i in range(millions)}
    stores = {
        kind: CheckpointStore(folder / kind, 1, group, in_background=kind == "background")
        for kind in ("at once", "background")
    }
    waits: dict[str, list[float]] = {kind: [] for kind in stores}
    whole, check = [], []
    for done in range(1, repeats + 1):
        for kind, store in stores.items():
            started = time.perf_counter()
            entries = {key: value.clone() for key, value in state.items()}  # as StudentEngine.state_dict does
            place = store.save(done, {"round": done}, entries)
            waits[kind].append(time.perf_counter() - started)
            del entries
            store.finish()
            whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        assert not store.problems(place)
        check.append(time.perf_counter() - started)
    size = 16 * millions / 1000
    medians = {kind: statistics.median(seconds) for kind, seconds in waits.items()}
    result = {
        "gigabytes": size,
        "seconds a round waits": medians,
        "at once / background": medians["at once"] / medians["background"],
        "MB/s copied, written, flushed and hashed": 1000 * size / statistics.median(whole),
        "MB/s checked at a resume": 1000 * size / statistics.median(check),
    }
    print(json.dumps(result, indent=1))
    shutil.rmtree(folder)
