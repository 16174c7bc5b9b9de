"""Jobs of `python -m benchmarks speed`, one after the other, and what they say together: speed.json.

A job is one set of processes; what it measured is kept in its folder and not measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.ranks import run_ranks
from benchmarks.speed import worker
from benchmarks.speed.peers import PEERS, PUBLIC, Peer
from benchmarks.speed.sizes import SETTINGS, SIZES, Setting, Size, run_config
from benchmarks.speed.switches import SWITCHES, Switch
from opd_ds.errors import UserError
from opd_ds.plan.costs import Costs
from opd_ds.plan.network import find_model

WITH_REWARDS = f"{PUBLIC} with rewards"
_Loop = tuple[str, dict[str, Any]]  # its kind and its config
STATE_BUCKET = 100_000  # elements: working buffers should be small beside what is counted


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        samples: trajectories per task and device; 3 in the public code's configuration.
        settings: timed beside the public loop, at `samples`.
        peers: timed beside ours in the first setting, which all of them know, at their batches.
    """

    size: Size
    worlds: tuple[int, ...]
    samples: int = 3
    settings: tuple[Setting, ...] = SETTINGS
    peers: tuple[Peer, ...] = tuple(PEERS.values())
    switches: tuple[Switch, ...] = SWITCHES
    memory: bool = True
    state_worlds: tuple[int, ...] = (1, 2, 4, 8)


def quick(size: Size) -> Bench:
    """The ratios to the public loop on one device alone."""
    return Bench(size, worlds=(1,), peers=(), switches=(), memory=False)


@dataclass
class _Jobs:
    bench: Bench
    folder: Path
    say: Callable[[str], None]
    files: Path = field(init=False)

    def __post_init__(self) -> None:
        self.files = (self.folder / "models").resolve()

    def config(self, setting: Setting, ranks: int, samples: int | None = None, **changes: Any) -> dict[str, Any]:
        made = run_config(self.bench.size, setting, ranks, samples or self.bench.samples, self.files, **changes)
        return made.model_dump(mode="json")

    def run(
        self,
        name: str,
        ranks: int,
        loops: Mapping[str, _Loop],
        measure: str = "time",
    ) -> dict[str, Any]:
        """By the worker; `loops` are (kind, config) by name."""
        place = (self.folder / name).resolve()
        spec_file, out = place / "spec.json", place / "measured.json"
        spec = {
            "loops": {loop: {"kind": kind, "config": config} for loop, (kind, config) in loops.items()},
            "repetitions": self.bench.size.repetitions,
            "measure": measure,
        }
        if out.is_file():
            if json.loads(spec_file.read_text(encoding="utf-8")) != spec:
                raise UserError(
                    f"--output-dir {self.folder}: {name} was measured with other settings; give another folder"
                )
        else:
            place.mkdir(parents=True, exist_ok=True)
            spec_file.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
            threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
            environment = {"OMP_NUM_THREADS": threads}
            run_ranks(worker.__name__, [str(spec_file), str(out)], ranks, place, environment)
        return json.loads(out.read_text(encoding="utf-8"))


def bench(wanted: Bench, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what is missing in `folder` and write speed.json there; returns its content.

    Raises:
        UserError: a size that needs a GPU where there is none; a job failed, naming its logs.
    """
    if wanted.size.needs_gpu and not torch.cuda.is_available():
        raise UserError(f"--size {wanted.size.name} needs a GPU; on CPUs: miniature or 50m")
    jobs = _Jobs(wanted, folder, say)
    possible = [ranks for ranks in wanted.worlds if _possible(ranks)]
    if not possible:
        raise UserError(f"--world-sizes: there are only {torch.cuda.device_count()} GPUs")
    worlds = {ranks: {setting.name: _ratios(jobs, setting, ranks) for setting in wanted.settings} for ranks in possible}
    first = worlds[possible[0]]
    found: dict[str, Any] = {
        "size": wanted.size.name,
        "samples_per_task_and_device": wanted.samples,
        "device": next(iter(first.values()))["device"],
        "torch": torch.__version__,
        "ratios": {name: entry["ratios"] for name, entry in first.items()},
        "by_world_size": {str(ranks): entries for ranks, entries in worlds.items()},
        "peers": [_peer(jobs, peer, ranks) for ranks in possible for peer in wanted.peers],
        "switches": [_switch(jobs, switch) for switch in wanted.switches if switch.ranks <= max(possible)],
    }
    if wanted.memory:
        found["memory"] = {setting.name: _memory(jobs, setting) for setting in wanted.settings}
        found["zero3_state"] = _states(jobs, tuple(filter(_possible, wanted.state_worlds)))
    (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _possible(ranks: int) -> bool:
    """Ranks share CPUs but no GPU."""
    return ranks <= torch.cuda.device_count() or not torch.cuda.is_available()


def _ratios(jobs: _Jobs, setting: Setting, ranks: int) -> dict[str, Any]:
    """The public loop and ours, of one setting."""
    plain = jobs.config(setting, ranks)
    loops = {PUBLIC: (PUBLIC, plain), **_ours(jobs, setting, ranks)}
    if jobs.bench.size.scored and setting == SETTINGS[0] and ranks == jobs.bench.worlds[0]:
        loops[WITH_REWARDS] = (WITH_REWARDS, _with_rewards(plain))
    measured = jobs.run(f"{setting.name}-{ranks}", ranks, loops)
    timed = measured["loops"]
    ratios = {f"{mode}_over_public": _ratio(timed[PUBLIC], timed.get(mode)) for mode in ("buffered", "fused")}
    if WITH_REWARDS in timed:
        ratios |= {
            f"{mode}_over_public_with_rewards": _ratio(timed[WITH_REWARDS], timed[mode])
            for mode in ("buffered", "fused")
        }
    said = ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}x" for name, ratio in ratios.items() if ratio)
    jobs.say(f"{setting.name}, {_ranks(ranks)}: {said}")
    return {"ratios": ratios, **_described(measured, plain, jobs.bench.samples)}


def _ours(
    jobs: _Jobs, setting: Setting, ranks: int, rows: int | None = None, at: int | None = None
) -> dict[str, _Loop]:
    """Our loops by mode, on `rows` trajectories a task and device, in micro-batches of `at`; None: as the bench has."""
    size = {} if at is None else {"micro_batch": at}
    sections = {"scoring": size, "train": size}
    return {
        mode: ("ours", jobs.config(setting, ranks, rows, rollout={"mode": mode} | size, **sections))
        for mode in setting.modes
    }


def _peer(jobs: _Jobs, peer: Peer, ranks: int) -> dict[str, Any]:
    """A peer and ours on equal work in the first setting, ours with its own micro-batches and with the peer's."""
    setting = SETTINGS[0]
    plain = jobs.config(setting, ranks, peer.batch)
    equal = _ours(jobs, setting, ranks, peer.batch, peer.batch)
    loops = {peer.name: (peer.name, plain), **_ours(jobs, setting, ranks, peer.batch)}
    loops |= {f"{mode} at its batches": loop for mode, loop in equal.items()}
    measured = jobs.run(f"peer-{peer.name}-{ranks}", ranks, loops)
    timed = measured["loops"]
    ratios = {name: _ratio(timed[peer.name], timed[name]) for name in loops if name != peer.name}
    jobs.say(f"{peer.name}, {_ranks(ranks)}: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()))
    return {
        "peer": peer.name,
        "what": peer.what,
        "ranks": ranks,
        "samples_per_task_and_device": peer.batch,
        "ratios": ratios,
        **_described(measured, plain, peer.batch),
    }


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _described(measured: dict[str, Any], config: dict[str, Any], samples: int) -> dict[str, Any]:
    """What a job says beside its ratios."""
    work, peak = flops_per_pass(config), measured["matmul_flops"]
    return {
        "device": measured["device"],
        "threads_per_rank": measured["threads"],
        "matmul_gflops": round(peak / 1e9, 1),
        "loops": {name: _loop(entry, work, peak, samples) for name, entry in measured["loops"].items()},
    }


def _ratio(theirs: dict[str, Any], ours: dict[str, Any] | None) -> float | None:
    """How much faster, as the median over pairs of rounds that were timed next to each other."""
    if ours is None:
        return None
    return round(median(a / b for a, b in zip(theirs["seconds"], ours["seconds"], strict=True)), 3)


def _with_rewards(config: dict[str, Any]) -> dict[str, Any]:
    tasks = {name: task | {"rewards": [f"miniature_{name}"]} for name, task in config["tasks"].items()}
    return config | {"tasks": tasks}


def flops_per_pass(config: dict[str, Any]) -> dict[str, float]:
    """Of one pass over one latent, `forward` and its `backward`; products of matrices and attention."""
    from opd_ds.config.loading import parse_config

    parsed = parse_config(config)
    costs = Costs(find_model(parsed), parsed)
    trained = costs.train(1, checkpointing=False).flops
    return {"forward": costs.forward(1).flops, "backward": trained - costs.forward(1).flops}


def _loop(entry: dict[str, Any], flops: dict[str, float], peak: float, samples: int) -> dict[str, Any]:
    """A loop's medians. Shares of the peak (MFU): of the whole round, and of the student's forward and backward."""
    seconds, passes = median(entry["seconds"]), entry["passes"]
    phases = {name: median(row.get(name, 0.0) for row in entry["phases"]) for name in entry["phases"][0]}
    work = sum(passes[kind] * flops[kind] for kind in ("forward", "backward"))
    result = {
        "seconds": round(seconds, 4),
        "samples_per_second_and_device": round(3 * samples / seconds, 3),
        "phases": {name: round(value, 4) for name, value in phases.items()},
        "passes": passes,
        "first_loss": entry["first_loss"],
        "mfu_round": round(work / seconds / peak, 4),
    }
    if "score" in phases:  # the phases are apart: what is trained is the student's alone
        trained = passes["backward"] * (flops["forward"] + flops["backward"])
        result["mfu_student"] = round(trained / phases["train"] / peak, 4)
    if "peak_with_all_loops" in entry:
        result["peak_with_all_loops"] = entry["peak_with_all_loops"]
    return result


def _switch(jobs: _Jobs, switch: Switch) -> dict[str, Any]:
    setting, ranks = switch.setting, switch.ranks
    loops = {
        "off": ("ours", jobs.config(setting, ranks, **switch.off(jobs.bench.samples))),
        "on": ("ours", jobs.config(setting, ranks, **switch.on(jobs.bench.samples))),
    }
    timed = jobs.run(f"switch-{switch.name}", ranks, loops)["loops"]
    ratio = _ratio(timed["off"], timed["on"])
    jobs.say(f"{switch.what}: {ratio:.2f}x")
    return {"name": switch.name, "what": switch.what, "setting": setting.name, "ranks": ranks, "off_over_on": ratio}


def _memory(jobs: _Jobs, setting: Setting) -> dict[str, Any]:
    """Peaks of processes that run one loop each."""
    loops = {PUBLIC: (PUBLIC, jobs.config(setting, 1)), **_ours(jobs, setting, 1)}
    found = {}
    for name, loop in loops.items():
        measured = jobs.run(f"memory-{setting.name}-{name}", 1, {name: loop}, "memory")
        found[name] = max(measured["peak"])
    return found


def _states(jobs: _Jobs, worlds: tuple[int, ...]) -> dict[str, Any]:
    """A full-parameter student with an average under ZeRO-3, by world size."""
    ds_config = jobs.folder.resolve() / "zero3.json"
    zero = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": STATE_BUCKET}
    zero |= {"stage3_prefetch_bucket_size": STATE_BUCKET, "stage3_param_persistence_threshold": 1_000}
    optimizer = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    ds_config.write_text(json.dumps({"zero_optimization": zero, "optimizer": optimizer}), encoding="utf-8")
    found: dict[str, Any] = {}
    for ranks in worlds:
        config = jobs.config(SETTINGS[1], ranks, 1, deepspeed=str(ds_config))
        measured = jobs.run(f"state-{ranks}", ranks, {"sharded": ("ours", config)}, "state")
        moved = _received(measured["collectives"], ranks)
        found[str(ranks)] = {"bytes": max(measured["state"]), "received": moved, "collectives": measured["collectives"]}
    alone = found[str(worlds[0])]["bytes"]
    for name, entry in found.items():
        entry["share"] = round(entry["bytes"] / alone, 3)
        jobs.say(f"ZeRO-3 state per rank, {name} ranks: {entry['bytes'] / 2**20:.1f} MiB, {entry['share']:.2f} of one")
    return found


def _received(collectives: dict[str, dict[str, int]], ranks: int) -> dict[str, float]:
    """Bytes that a rank receives in a round, by kind. DeepSpeed counts what a rank puts in: its shard where weights are
    gathered, whole gradients where they are reduced.
    """
    share = {"all_gather_into_tensor": ranks - 1, "reduce_scatter_tensor": (ranks - 1) / ranks}
    share["all_reduce"] = 2 * (ranks - 1) / ranks
    return {
        kind: share.get(kind, 1) * sum(int(size) * count for size, count in by_size.items())
        for kind, by_size in collectives.items()
    }


def check(found: dict[str, Any], baseline: Path, tolerance: float = 0.6) -> list[str]:
    """What has become slower: ratios below `tolerance` of those in `baseline`, an earlier speed.json.

    Raises:
        UserError: the baseline is of another size.
    """
    before = json.loads(baseline.read_text(encoding="utf-8"))
    if before["size"] != found["size"]:
        raise UserError(f"--check {baseline}: measured with --size {before['size']}, not {found['size']}")
    return [
        f"{setting}, {name.replace('_', ' ')}: {now[name]:.2f}x, in the baseline {ratio:.2f}x"
        for setting, ratios in before["ratios"].items()
        for now in [found["ratios"][setting]]
        for name, ratio in ratios.items()
        if ratio is not None and now[name] < tolerance * ratio
    ]


def usual_worlds() -> str:
    """1, 2 and 4 ranks, as far as there is a GPU or a core for each."""
    devices = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    return ",".join(str(ranks) for ranks in (1, 2, 4) if ranks <= devices)


def size_named(name: str) -> Size:
    """One of `SIZES`.

    Raises:
        UserError: there is none.
    """
    if name not in SIZES:
        raise UserError(f"--size {name}: allowed are {', '.join(SIZES)}")
    return SIZES[name]


def peers_named(names: Sequence[str] | None) -> tuple[Peer, ...]:
    """Of `PEERS`; all of them where none is named.

    Raises:
        UserError: there is none of that name.
    """
    for name in names or ():
        if name not in PEERS:
            raise UserError(f"--peer {name}: allowed are {', '.join(PEERS)}")
    return tuple(PEERS[name] for name in names or PEERS)
