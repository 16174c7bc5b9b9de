"""Shared fixtures: one tiny world, one process group of a single rank, one cache of compiled ops."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Before torch is imported: `set_num_threads` comes too late for OpenMP's pool, whose threads then fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One build of DeepSpeed's small CPU op for all tests with one environment: with two they would rebuild it in turns.
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    str(Path(tempfile.gettempdir(), f"opd_ds_test_ops_{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}")),
)

import pytest
import torch

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.engine import Group, init_group
from opd_ds.runs.setup import Parts, prepare
from opd_ds.utils.logging import quiet_libraries
from tests.tiny import run_settings, write_config, write_world


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one worker, for what its tests share; so does all that needs the one cluster."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start ranks go first: they take longest, and a worker should not be left with one at the end."""
    long = {item.path for item in items if item.get_closest_marker("multirank")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    quiet_libraries()
    torch.set_num_threads(1)  # bit-for-bit comparisons should not depend on how work was cut over threads


@pytest.fixture(scope="module", autouse=True)
def _collect_only_what_is_new() -> None:
    """DeepSpeed's ZeRO-3 makes a full collection at each start, which takes half a second of looking at libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Commands in this process show the log on the terminal; the next test may read what a command prints."""
    logger = logging.getLogger("opd_ds")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def group() -> Iterator[Group]:
    world = World()
    prepare_environment(world)
    yield init_group(world)
    torch.distributed.destroy_process_group()


@pytest.fixture
def config_file(tiny_world: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out"))


@pytest.fixture
def configured(tiny_world: Path, tmp_path: Path) -> Callable[..., DistilConfig]:
    """A run config; keyword arguments as for `run_settings`."""
    return lambda **changes: DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", **changes))


@pytest.fixture
def build_run(tiny_world: Path, tmp_path: Path, group: Group) -> Callable[..., tuple[RunConfig, Parts]]:
    """Build a run in this process; keyword arguments as for `run_settings`."""

    def build(**changes: Any) -> tuple[RunConfig, Parts]:
        config = DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", **changes))
        return config, prepare(config, group)

    return build


@pytest.fixture
def sgd(tmp_path: Path) -> Callable[[int], str]:
    """ds_config of plain SGD at a ZeRO stage."""

    def write(stage: int) -> str:
        file = tmp_path / f"sgd{stage}.json"
        zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
        optimizer = {"type": "SGD", "params": {"lr": "auto"}}
        settings = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "optimizer": optimizer}
        file.write_text(json.dumps(settings))
        return str(file)

    return write
