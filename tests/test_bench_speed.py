"""The public loop does our work, and what `python -m benchmarks speed` says of the two."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import speed
from benchmarks.speed.peers import PEERS, peer_loop
from benchmarks.speed.public_loop import PublicLoop
from benchmarks.speed.report import write_report
from benchmarks.speed.sizes import SETTINGS, SIZES, Size, run_config
from benchmarks.speed.switches import SWITCHES
from benchmarks.speed.worker import matmul_peak
from opd_ds.checkpoint.export_student import STUDENT_ADAPTER
from opd_ds.engine import Group, counted_collectives
from opd_ds.errors import UserError
from opd_ds.miniature.world import TASKS
from opd_ds.models import lora
from opd_ds.runs.setup import prepare
from tests.ranks import launch
from tests.tiny import TARGETS, write_lora


@pytest.fixture(scope="module")
def tiny(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Size:
    """A size whose rounds cost nothing."""
    folder = tmp_path_factory.mktemp("loras")
    adapters = {task: str(write_lora(tiny_world / "base", folder / task, seed)) for seed, task in enumerate(TASKS)}

    def write(_: Path) -> dict[str, Any]:
        return {
            "model": {"path": str(tiny_world / "base"), "max_text_length": 10},
            "prompts": dict.fromkeys(TASKS, str(tiny_world / "prompts.txt")),
            "full": dict.fromkeys(TASKS, str(tiny_world / "other")),
            "lora": adapters,
        }

    return Size("tiny", write, repetitions=2)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_the_public_loop_does_our_work(tiny: Size, setting: Any, group: Group, tmp_path: Path) -> None:
    """The same losses over rounds that build on each other, so the same gradients; and as many passes as it says."""
    config = run_config(tiny, setting, 1, 2, tmp_path, optimizer={"lr": 1e-3})
    public, ours = PublicLoop(config, group), prepare(config, group).trainer
    losses = []
    for index in range(2):
        report = ours.run_round(index)
        losses.append((public.run_round(index), report.losses.loss))
    for theirs, mine in losses:
        assert theirs == pytest.approx(mine, rel=2e-3)
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    assert losses[0][0] != losses[1][0]
    # The teachers' last velocity is never used: 1 + 2 + 2 passes of it for each of 2 samples. Nor are the student's
    # last two, with which the rollouts of 3 tasks end: nobody looks at their images.
    assert public.passes["forward"] - report.passes["forward"] == 2 * 5 + 2 * 3 * 2 * 2
    assert public.passes["backward"] == report.passes["backward"]
    if setting.kind == "full":
        weights = prepare(config, group).student.gather_weights(trainable_only=True)
        assert any(not torch.equal(p, weights[n]) for n, p in public._network.named_parameters())


def test_the_other_peers_do_the_public_loops_work(tiny: Size, group: Group, tmp_path: Path) -> None:
    """Losses of rounds that build on each other; teachers are not asked at the last state, whose step is not trained;
    a teacher whose weights are put into the student's adapter leaves no trace.
    """
    student = {"lora": {"rank": 4, "alpha": 8, "targets": TARGETS}}
    config = run_config(
        tiny, SETTINGS[0], 1, 2, tmp_path, optimizer={"lr": 1e-2}, student=student, rollout={"steps": 4}
    )
    loops = {name: peer_loop(name)(config, group) for name in PEERS}
    losses = {name: [loop.run_round(index) for index in range(3)] for name, loop in loops.items()}
    for name in ("flow-opd", "flow-factory"):
        assert losses[name] == pytest.approx(losses["public"], rel=1e-5)
        assert loops["public"].passes["forward"] - loops[name].passes["forward"] == 2 * 5
        assert loops["public"].passes["backward"] == loops[name].passes["backward"]
    assert losses["public"][0] != pytest.approx(losses["public"][2], rel=1e-3)
    ours = [lora.adapter_parameters(loop._network, STUDENT_ADAPTER) for loop in loops.values()]
    for key, value in ours[0].items():
        torch.testing.assert_close([other[key] for other in ours[1:]], [value, value], rtol=1e-3, atol=1e-5)


def test_the_public_loop_judges_every_round_where_asked(tiny: Size, group: Group, tmp_path: Path) -> None:
    public = PublicLoop(run_config(tiny, SETTINGS[0], 1, 2, tmp_path), group)
    seen: list[tuple[str, int]] = []
    public.scoring = lambda task, latents, prompts: seen.append((task, len(latents)))
    public.run_round(0)
    assert seen == [(task, 2) for task in TASKS]
    assert {"encode", "rollout", "rewards", "score", "train", "step"} == public.seconds.keys()


def test_a_teacher_that_comes_and_goes_leaves_the_device(tiny: Size, group: Group, tmp_path: Path) -> None:
    config = run_config(tiny, SETTINGS[2], 1, 1, tmp_path)
    public = PublicLoop(config, group)
    before = {n: p.clone() for n, p in public._teachers["text"].named_parameters()}
    public.run_round(0)
    assert all(torch.equal(p, before[n]) for n, p in public._teachers["text"].named_parameters())
    assert {p.device.type for p in public._teachers["text"].parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["miniature"])
def test_every_switch_is_a_run(name: str, tmp_path: Path) -> None:
    """Off and on differ, and only in how the round is cut: a resume from one to the other is allowed."""
    for switch in SWITCHES:
        off, on = (
            run_config(SIZES[name], switch.setting, switch.ranks, 3, tmp_path, **sections(3))
            for sections in (switch.off, switch.on)
        )
        assert off != on
        ignored = {
            "rollout": {"micro_batch", "mode", "gather"},
            "train": {"micro_batch"},
            "scoring": True,
            "model": {"compile_blocks"},
        }
        assert off.model_dump(exclude=ignored) == on.model_dump(exclude=ignored)


@pytest.fixture(scope="module")
def measured(tiny: Size, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One setting in a fork, in place of a process, in which `.ci/run` measures."""

    def in_forks(module: str, arguments: list[str], ranks: int, logs: Path, more: Mapping[str, str]) -> None:
        launch(ranks, *arguments, script=module)

    folder = tmp_path_factory.mktemp("speed")
    wanted = replace(speed.quick(tiny), settings=SETTINGS[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "run_ranks", in_forks)
        return speed.bench(wanted, folder, lambda line: None), folder


@pytest.mark.extended
@pytest.mark.multirank
def test_ratios_are_of_rounds_that_were_timed_in_turns(measured: tuple[dict[str, Any], Path]) -> None:
    found, folder = measured
    raw = json.loads((folder / "lora-resident-1" / "measured.json").read_text())["loops"]
    assert {name: len(loop["seconds"]) for name, loop in raw.items()} == {"public": 2, "buffered": 2, "fused": 2}
    ratios = found["ratios"]["lora-resident"]
    for mode in ("buffered", "fused"):
        pairs = [a / b for a, b in zip(raw["public"]["seconds"], raw[mode]["seconds"], strict=True)]
        assert ratios[f"{mode}_over_public"] == pytest.approx(sum(pairs) / 2, abs=1e-3)
    losses = [loop["first_loss"] for loop in raw.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    loops = found["by_world_size"]["1"]["lora-resident"]["loops"]
    assert 0 < loops["buffered"]["mfu_round"] < 1
    assert loops["fused"]["passes"]["forward"] < loops["buffered"]["passes"]["forward"]


def peer_entry(tiny: Size, folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, dict[str, Any]]]]:
    """What is said of Flow-OPD where each loop takes one second more than the one before; and the loops."""
    loops: dict[str, tuple[str, dict[str, Any]]] = {}

    class Jobs(speed._Jobs):
        def run(self, name: str, ranks: int, given: Any, measure: str = "time") -> dict[str, Any]:
            loops.update(given)
            phases = dict.fromkeys(("score", "train"), 0.1)
            entry = {"passes": {"forward": 2, "backward": 1}, "first_loss": 0.5, "phases": [phases]}
            timed = {loop: entry | {"seconds": [index + 1.0]} for index, loop in enumerate(given)}
            return {"loops": timed, "device": "cpu", "threads": 1, "matmul_flops": 1e12}

    jobs = Jobs(speed.Bench(tiny, worlds=(1,)), folder, lambda line: None)
    return speed._peer(jobs, PEERS["flow-opd"], 1), loops


def test_a_peer_is_compared_at_both_batch_sizes_on_equal_work(tiny: Size, tmp_path: Path) -> None:
    peer, loops = peer_entry(tiny, tmp_path)
    sizes = {
        name: (kind, *(config[stage]["micro_batch"] for stage in ("rollout", "scoring", "train")))
        for name, (kind, config) in loops.items()
    }
    assert sizes == {
        "flow-opd": ("flow-opd", 12, None, 36),
        "buffered": ("ours", 12, None, 36),
        "fused": ("ours", 12, None, 36),
        "buffered at its batches": ("ours", 4, 4, 4),
        "fused at its batches": ("ours", 4, 4, 4),
    }
    assert {config["rollout"]["samples"] for _, config in loops.values()} == {4}
    assert list(peer["ratios"].values()) == [0.5, 0.333, 0.25, 0.2]


@pytest.mark.extended
@pytest.mark.multirank
def test_what_is_measured_is_not_measured_again(measured: tuple[dict[str, Any], Path], tiny: Size) -> None:
    found, folder = measured
    file = folder / "lora-resident-1" / "measured.json"
    before = file.stat().st_mtime_ns
    again = speed.bench(replace(speed.quick(tiny), settings=SETTINGS[:1]), folder, lambda line: None)
    assert again == found == json.loads((folder / "speed.json").read_text())
    assert file.stat().st_mtime_ns == before


@pytest.mark.extended
@pytest.mark.multirank
def test_what_was_measured_with_other_settings_is_refused(measured: tuple[dict[str, Any], Path], tiny: Size) -> None:
    other = replace(speed.quick(tiny), settings=SETTINGS[:1], samples=2)
    with pytest.raises(UserError, match="lora-resident-1 was measured with other settings; give another folder"):
        speed.bench(other, measured[1], lambda line: None)


@pytest.mark.extended
@pytest.mark.multirank
def test_the_report_shows_all_of_it(measured: tuple[dict[str, Any], Path], tiny: Size, tmp_path: Path) -> None:
    found = copy.deepcopy(measured[0]) | {"peers": [peer_entry(tiny, tmp_path)[0]]}
    found["switches"] = [{"name": "x", "what": "this instead of that", "setting": "s", "ranks": 1, "off_over_on": 1.5}]
    found["memory"] = {"lora-resident": {"public": 3 * 2**20}}
    entry = {"bytes": 2**21, "share": 0.25, "received": {"all_gather_into_tensor": 2.0**20}, "collectives": {}}
    found["zero3_state"] = {"4": entry}
    write_report(found, tmp_path)
    text = (tmp_path / "speed.md").read_text()
    for piece in (
        "| lora-resident | 1 | ",
        "this instead of that | s | 1 | 1.50x",
        "| public | 3 |",
        "| 4 | 2.0 | 0.25 | 1.0 |",
        "| Flow-OPD, mode gkd | 1 | 4 | 0.50x | 0.33x | 0.25x | 0.20x |",
    ):
        assert piece in text
    with (tmp_path / "ratios.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["lora-resident"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("ratios.png", "phases.png"))


def test_a_ratio_that_falls_is_named(tmp_path: Path) -> None:
    baseline = {
        "size": "miniature",
        "ratios": {"full-offload": {"buffered_over_public": 2.0, "fused_over_public": None}},
    }
    (tmp_path / "speed.json").write_text(json.dumps(baseline))

    def check(ratio: float) -> list[str]:
        found = {
            "size": "miniature",
            "ratios": {"full-offload": {"buffered_over_public": ratio, "fused_over_public": None}},
        }
        return speed.check(found, tmp_path / "speed.json")

    assert check(1.21) == []
    assert check(1.19) == ["full-offload, buffered over public: 1.19x, in the baseline 2.00x"]
    with pytest.raises(UserError, match="measured with --size miniature, not 50m"):
        speed.check({"size": "50m", "ratios": {}}, tmp_path / "speed.json")


def test_received_bytes_by_formula() -> None:
    """Of four ranks: three other shards of a gather, three quarters of what is scattered, twice that of all-reduce."""
    counted = {"all_gather_into_tensor": {"10": 2}, "reduce_scatter_tensor": {"40": 1}, "all_reduce": {"8": 1}}
    assert speed._received(counted, 4) == {
        "all_gather_into_tensor": 60,
        "reduce_scatter_tensor": 30.0,
        "all_reduce": 12.0,
    }


def test_sizes_that_are_not_there_and_gpus_that_are_not_there(tmp_path: Path, group: Group) -> None:
    with pytest.raises(UserError, match="--peer verl: allowed are public, flow-opd, flow-factory"):
        speed.peers_named(["flow-opd", "verl"])
    with pytest.raises(UserError, match="--size huge: allowed are miniature, 50m, sd35m"):
        speed.size_named("huge")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--size sd35m needs a GPU"):
            speed.bench(speed.quick(SIZES["sd35m"]), tmp_path, print)
    assert matmul_peak(group, "fp32") > 1e8


def test_collectives_are_counted_by_size_and_only_meanwhile(group: Group) -> None:
    group.sum(torch.ones(4))
    with counted_collectives() as counts:
        group.sum(torch.ones(4))  # 8 bytes each: added up in float64
        group.sum(torch.ones(4))
        group.sum(torch.ones(2))
        assert group.gather(5) == [5]  # objects are not counted
    group.sum(torch.ones(4))
    assert counts["all_reduce"] == {32: 2, 16: 1}
