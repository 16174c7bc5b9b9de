"""One rank of `python -m benchmarks loading`: networks are loaded while a thread samples memory.

python -m benchmarks.loading_worker CONFIG.yaml OUT.json     (RANK, WORLD_SIZE and so on as torchrun sets them)
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from threading import Thread

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world
from opd_ds.config.loading import load_config

_SECONDS_BETWEEN_SAMPLES = 0.005


class PeakMemory:
    """The most bytes beyond those at the start: of anonymous memory and of pages of mapped files.

    The kernel keeps a peak of both together only, so a thread samples them.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._start, self._peak = _resident(), (0, 0)
        Thread(target=self._sample, daemon=True).start()

    def next(self) -> tuple[int, int]:
        """(anonymous, mapped) since the last call."""
        self._note()
        found, self._peak = self._peak, (0, 0)
        return found

    def _sample(self) -> None:
        while True:
            self._note()
            time.sleep(_SECONDS_BETWEEN_SAMPLES)

    def _note(self) -> None:
        grown = (now - start for now, start in zip(_resident(), self._start, strict=True))
        self._peak = tuple(map(max, self._peak, grown))  # type: ignore[assignment]


def main(config_file: str, out: str) -> None:
    """Rank 0 writes `out`: bytes and seconds on every rank."""
    world = detect_world()
    prepare_environment(world)
    config = load_config(None, Path(config_file), [])
    import diffusers

    from opd_ds.engine import StudentEngine, init_group, parameter_builder
    from opd_ds.models import family_class
    from opd_ds.runs.files import find_files
    from opd_ds.training.networks import load_family, student_module
    from opd_ds.training.teachers import TeacherPool
    from opd_ds.utils.logging import quiet_libraries

    quiet_libraries()
    getattr(diffusers, family_class(config.model.family).transformer_class)  # what it imports is not the network's
    with init_group(world) as group:
        files = find_files(config, world)
        family = load_family(config, files.model, group.device)
        group.gather(None)
        memory, read, started = PeakMemory(), _characters_read(), time.monotonic()
        build = parameter_builder(files.student_ds_config, group.device, family.empty_transformer)
        module = student_module(config.student, config.run.seed, family, None, build)
        found: dict[str, float] = dict(zip(("network", "mapped"), memory.next(), strict=True))
        student = StudentEngine(module, files.student_ds_config, group, config.rollout.gather, files.schedule)
        found["engine"] = memory.next()[0]
        teachers = TeacherPool(family, files.teachers, group.device)
        found["teacher"] = memory.next()[0]
        found["read"] = _characters_read() - read
        found["seconds"] = time.monotonic() - started
        found["parameters"] = sum(p.ds_numel for p in module.parameters())  # type: ignore[attr-defined]
        found["buffers"] = sum(buffer.nbytes for buffer in module.buffers())
        ranks = group.gather(found)
        del student, teachers
        if world.is_main:
            Path(out).write_text(json.dumps(ranks) + "\n", encoding="utf-8")


def _characters_read() -> int:
    """By read(2), from the page cache or not; pages of mapped files are not in it."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("rchar:")[1].split()[0])


def anonymous_memory() -> int:
    """Bytes of this process that belong to no file."""
    return _status("RssAnon")


def _resident() -> tuple[int, int]:
    return anonymous_memory(), _status("RssFile")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    os._exit(0)  # nothing is left to do; DeepSpeed's threads may take their time
