"""Rounds of a model of `--size`: seconds, FLOPs, memory beside the plan's, and what the teachers' placement costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.gpu.measure import GIB, HostToDevice, Planned, describe, time_rounds, watched
from benchmarks.gpu.session import Check, Session, synchronise
from benchmarks.plan_worker import baseline_memory
from benchmarks.speed.sizes import SIZES, Setting, run_config
from benchmarks.speed.worker import Loop, build
from opd_ds.config.algorithms import DistilConfig

_SAMPLES = {"lora": 3, "full": 1}  # per task; the public code has 3
_ROUNDS = 3
# Further rounds of full teachers, and what is measured in them.
MOVED, COMPUTE = "bytes to the device", "scoring without transfer"
_More = Callable[[Session, Loop, Check], None]


def lora(session: Session) -> None:
    """The public loop, and ours on equal work: teachers in the student's network (the default), or beside it."""
    made = _Configs(session, "lora")
    _measure(session, made, "buffered, shared", made.config("shared"))
    _measure(session, made, "public", made.config("resident"), kind="public")
    _measure(session, made, "fused, shared", made.config("shared", rollout={"mode": "fused"}))
    _measure(session, made, "buffered, resident", made.config("resident"))
    _ratios(session, session.checks)


def compiled(session: Session) -> None:
    """Each way of a round without and with compiled blocks; the first round holds the compilation."""
    made, compiled_blocks = _Configs(session, "lora"), {"compile_blocks": True}
    ways: dict[str, dict[str, Any]] = {
        "buffered": {},
        "buffered, ZeRO-3 layer by layer": {"deepspeed": "zero3", "rollout": {"gather": "per_layer"}},
        "fused": {"rollout": {"mode": "fused"}},
    }
    for name, changes in ways.items():
        _measure(session, made, name, made.config("resident", **changes))
        _measure(session, made, f"{name}, compiled", made.config("resident", **changes, model=compiled_blocks))
        with session.check(f"{name}: eager time in compiled time") as found:
            eager, fast = (session.checks[key] for key in (name, f"{name}, compiled"))
            found |= {"a round": eager["s/round"] / fast["s/round"]}
            found |= {"ms/pass unit, eager": eager["ms/pass unit"], "ms/pass unit, compiled": fast["ms/pass unit"]}


def full_offload(session: Session) -> None:
    """Beside its rounds: what scoring takes where no weights travel, for the other placements too."""
    _full(session, "offload", {COMPUTE: _score_without_transfer})


def full_stream(session: Session) -> None:
    _full(session, "stream")


def full_zero_inference(session: Session) -> None:
    _full(session, "zero_inference")


def _full(session: Session, placement: str, more: Mapping[str, _More] = MappingProxyType({})) -> None:
    made = _Configs(session, "full")
    _measure(session, made, placement, made.config(placement), more={MOVED: _transfers, **more})
    _overlap(session, placement)


class _Configs:
    """Runs of one kind of student and teachers, and their plan."""

    def __init__(self, session: Session, kind: str) -> None:
        self._session, self._kind, self._size = session, kind, SIZES[session.size]
        self.files = session.scratch / "models" / session.size
        with session.check("writing the models"):
            self._size.write(self.files)
        first = self._config("resident")
        self.planned = Planned.of(first, session)
        pairs = first.train.micro_batch
        sizes = tuple(size for size in (pairs, pairs // 3, pairs // 9, 1) if size)
        self._micro_batch = self.planned.micro_batch(self._config("offload"), sizes)

    def config(self, placement: str, **changes: Any) -> DistilConfig:
        return self._config(placement, **{"train": {"micro_batch": self._micro_batch}, **changes})

    def _config(self, placement: str, **changes: Any) -> DistilConfig:
        settings = {"deepspeed": "zero2", "student": {"gradient_checkpointing": self._kind == "full"}} | changes
        samples = _SAMPLES[self._kind] if self._session.on_gpu else 1
        return run_config(self._size, Setting(self._kind, placement), 1, samples, self.files, **settings)


def _measure(
    session: Session,
    made: _Configs,
    name: str,
    config: DistilConfig,
    *,
    kind: str = "ours",
    more: Mapping[str, _More] = MappingProxyType({}),
) -> None:
    with session.check(name) as found:
        baseline, started = baseline_memory(session.group), time.perf_counter()
        loop = build(name, {"kind": kind, "config": config.model_dump(mode="json")}, session.group)
        found["loading, s"] = time.perf_counter() - started
        found["pairs at once"] = config.train.micro_batch if kind == "ours" else config.rollout.samples
        measured = time_rounds(loop, session, most=_ROUNDS if session.on_gpu else 1, seconds=session.left / 6)
        describe(found, measured, config, session, made.planned)
        if session.on_gpu:  # on a CPU libraries count too; `python -m benchmarks plan` knows how to leave them out
            found["peak, GiB"] = (measured["peak"] - baseline) / GIB
            found["held before, GiB"] = baseline / GIB
            if kind == "ours":
                found["planned, GiB"] = made.planned.peak(config) / GIB
    for what, also in more.items():
        with session.check(f"{name}: {what}") as found:
            also(session, loop, found)


def _ratios(session: Session, with_public: dict[str, Check]) -> None:
    """Of the rounds of this part, how many times those of the public loop, on equal work."""
    with session.check("rounds of the public loop in one of ours") as found:
        public = with_public["public"]["s/round"]
        measured = {name: check["s/round"] for name, check in session.checks.items() if "s/round" in check}
        found |= {name: public / seconds for name, seconds in measured.items() if name != "public"}


def _transfers(session: Session, loop: Loop, found: Check) -> None:
    """A further round, in which what scoring brings to the device is counted."""
    counter = HostToDevice()
    with watched(loop.inner, session, {"score": counter}):
        loop.inner.run_round(0)
    found["to the device, GB"] = counter.nbytes / 1e9


def _score_without_transfer(session: Session, loop: Loop, found: Check) -> None:
    """A further round, whose teachers are asked a second time while their weights are still there."""
    trainer, seconds = loop.inner, 0.0
    ask = trainer._query_frozen

    def twice(*arguments: Any) -> Any:
        nonlocal seconds
        found = ask(*arguments)
        synchronise()
        started = time.perf_counter()
        ask(*arguments)
        synchronise()
        seconds += time.perf_counter() - started
        return found

    trainer._query_frozen = twice
    trainer.run_round(0)
    del trainer._query_frozen
    found["score without transfer, s"] = seconds


def _overlap(session: Session, name: str) -> None:
    """How much of the weights' journey is hidden behind the teachers' forwards: 1 is all that could be."""
    rate = session.earlier.get("versions", {}).get("host to device, pinned", {}).get("GB/s")
    measured = {**session.checks[name], **session.checks.get(f"{name}: {MOVED}", {})}
    everything = {**session.earlier.get("full-offload", {}), **session.checks}
    offloaded = everything.get(f"offload: {COMPUTE}", {})
    if rate is None or not {"score, s", "to the device, GB"} <= measured.keys() or not offloaded:
        return
    with session.check("transfer behind compute") as found:
        compute, transfer = offloaded["score without transfer, s"], measured["to the device, GB"] / rate
        found |= {"compute, s": compute, "transfer alone, s": transfer, "score, s": measured["score, s"]}
        if transfer > 0:
            found["hidden"] = (compute + transfer - measured["score, s"]) / min(compute, transfer)
