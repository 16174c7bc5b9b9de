"""Checkpoints: whole or absent, found damaged, never lost; full disks, keep-k, writing in the background."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from opd_ds.checkpoint.store import CheckpointStore, latest_checkpoint, read_state, refuse_damaged
from opd_ds.config.algorithms import DistilConfig
from opd_ds.engine import Group, ShardReader
from opd_ds.errors import DamagedCheckpointError, UserError
from opd_ds.runs.train import train
from tests.ranks import launch
from tests.runs import metrics
from tests.tiny import ALL_SHARDED, run_settings, write_config

# Rounds of which only the number counts. Resuming at every stage: tests/test_run.py and tests/test_elastic.py.
CHEAP: dict[str, Any] = {"deepspeed": "zero1", "rollout__steps": 1}
STATE = {"round": 0, "shapes": {}}
ENTRIES = {"master/0/w": torch.arange(1000.0)}


def store(folder: Path, group: Group, keep: int = 2, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep, group, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def bit_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


SHARD = "shard-00000-of-00001.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped bit": (SHARD, bit_flip),
    "cut off": (SHARD, cut_off),
    "empty": (SHARD, lambda file: file.write_bytes(b"")),
    "missing": (SHARD, lambda file: file.unlink()),
    "other state": ("state.json", bit_flip),
    "no manifest": ("manifest.json", lambda file: file.unlink()),
    "cut off manifest": ("manifest.json", cut_off),
    "empty manifest": ("manifest.json", lambda file: file.write_text("{}")),
    "odd manifest": ("manifest.json", lambda file: file.write_text('{"state.json": 3}')),
}


# ---- a run over damage ----


@pytest.fixture
def run(tiny_world: Path, tmp_path: Path, group: Group) -> Callable[..., list[dict[str, float]]]:
    def start(name: str, resume: str = "auto", **changes: Any) -> list[dict[str, float]]:
        kept = {"run__rounds": 4, "run__checkpoint_every": 1, "run__keep_checkpoints": 3}
        chosen = kept | CHEAP | changes
        train(DistilConfig.model_validate(run_settings(tiny_world, tmp_path / name, **chosen)), group, resume)
        return metrics(tmp_path / name)

    return start


@pytest.mark.parametrize("kind", ["flipped bit", "no manifest"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The one before is taken, said in the log, and no number differs. All kinds of damage: with the store, below."""
    expected = run("out")
    file, damage = DAMAGES[kind]
    damage(tmp_path / "out" / "checkpoints" / "round-000004" / file)
    assert run("out") == expected
    assert "round-000004 is damaged" in caplog.text
    kept = ["round-000002", "round-000003", "round-000004"]
    assert names(tmp_path / "out") == ["damaged-round-000004", "latest", *kept]


def test_when_all_are_damaged_the_run_does_not_start_from_scratch(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path
) -> None:
    run("out", run__keep_checkpoints=1)
    cut_off(tmp_path / "out" / "checkpoints" / "round-000004" / SHARD)
    for _ in range(2):  # nor at the next try
        with pytest.raises(UserError, match="all 1 checkpoints are damaged, the newest first: round-000004"):
            run("out")
    with pytest.raises(UserError, match="damaged"):
        run("again", resume=str(tmp_path / "out" / "checkpoints" / "round-000004"))


def test_going_back_sets_later_checkpoints_aside(run: Callable[..., list[dict[str, float]]], tmp_path: Path) -> None:
    expected = run("out")
    assert run("out", resume=str(tmp_path / "out" / "checkpoints" / "round-000002"), run__rounds=3) == expected[:3]
    assert names(tmp_path / "out") == [
        "abandoned-round-000003",
        "abandoned-round-000004",
        "latest",
        "round-000002",
        "round-000003",
    ]
    assert run("out") == expected
    # Back on the other branch: it is not overwritten, nor is what was quarantined before.
    assert run("out", resume=str(tmp_path / "out" / "checkpoints" / "abandoned-round-000003")) == expected
    assert {"abandoned-round-000003", "abandoned-2-round-000003"} <= set(names(tmp_path / "out"))


def test_a_refused_resume_sets_nothing_aside(run: Callable[..., list[dict[str, float]]], tmp_path: Path) -> None:
    expected = run("out")
    run("other", optimizer__lr=0.5)
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.5"):
        run("out", resume=str(tmp_path / "other" / "checkpoints" / "round-000002"))
    assert names(tmp_path / "out") == ["latest", "round-000002", "round-000003", "round-000004"]
    assert run("out") == expected


def test_what_was_set_aside_is_not_forgotten(run: Callable[..., list[dict[str, float]]], tmp_path: Path) -> None:
    """Only quarantined checkpoints are left, from a start that was killed before its own first: no new run."""
    expected = run("out")
    checkpoints = tmp_path / "out" / "checkpoints"
    for number in (2, 3, 4):
        (checkpoints / f"round-00000{number}").rename(checkpoints / f"abandoned-round-00000{number}")
    with pytest.raises(UserError, match=r"are quarantined: .*round-000004; give one of them as --resume"):
        run("out")
    with pytest.raises(UserError, match=r"already holds .*abandoned-round-000002; give --resume auto"):
        run("out", resume="never")
    assert run("out", resume=str(checkpoints / "abandoned-round-000003")) == expected


def test_a_requeued_job_goes_on_from_what_it_made(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM starts it with its first arguments again, `--resume PATH` among them."""
    expected = run("out")
    start = tmp_path / "out" / "checkpoints" / "round-000002"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # lost before its first checkpoint: from where it was told
    assert run("out", resume=str(start), run__rounds=3) == expected[:3]
    assert "abandoned-round-000003" in names(tmp_path / "out")
    assert run("out", resume=str(start)) == expected
    assert "abandoned-2-round-000003" not in names(tmp_path / "out")
    monkeypatch.delenv("SLURM_RESTART_COUNT")  # somebody in an allocation of their own, who means what they say
    assert run("out", resume=str(start), run__rounds=3) == expected[:3]
    assert "abandoned-2-round-000003" in names(tmp_path / "out")


def test_a_resume_of_another_run_is_refused(
    run: Callable[..., list[dict[str, float]]], tiny_world: Path, tmp_path: Path
) -> None:
    """What decides a run's numbers: settings, sizes, and files by what is in them."""
    run("out", run__rounds=1)
    (tmp_path / "fewer.txt").write_text("a red 3\n")
    others = {
        r"rollout\.steps was 1 and is now 2": {"rollout__steps": 2},
        r"optimizer\.lr was 0\.001 and is now 0\.002": {"optimizer__lr": 0.002},
        r"model\.height, width or frames was \[4, 8, 8\] and is now \[4, 4, 8\]": {"model__height": 8},
        r"model\.negative_prompt was '' and is now ' '; set it back": {"model__negative_prompt": " "},
        r"model\.max_text_length was 10 and is now 8": {"model__max_text_length": 8},
        r"what lies at tasks\.one\.teacher\.path is not": {"tasks__one__teacher__path": str(tiny_world / "base")},
        r"what lies at tasks\.one\.prompts is not": {"tasks__one__prompts": str(tmp_path / "fewer.txt")},
    }
    for said, change in others.items():
        with pytest.raises(UserError, match=said):
            run("out", run__rounds=2, **change)


def test_an_old_checkpoint_that_does_not_go_away_stops_nothing(
    tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a folder that another process reads cannot be removed."""
    checkpoints = store(tmp_path, group, keep=1)
    checkpoints.save(1, STATE, ENTRIES)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        checkpoints.save(2, STATE, ENTRIES)
        assert "round-000002 is saved, but not all that it replaces is gone: " in caplog.text
        checkpoints.save(3, STATE, ENTRIES)
    checkpoints.save(4, STATE, ENTRIES)
    assert names(tmp_path) == ["latest", "round-000004"]


def test_a_rank_that_does_not_see_the_files_is_no_damage(
    tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that has not mounted the folder: the run ends, and nothing is quarantined."""
    kept = store(tmp_path, group)
    kept.save(1, STATE, ENTRIES)
    plain = group.gather
    monkeypatch.setattr(
        group, "gather", lambda value: [*plain(value), ([SHARD], [])] if isinstance(value, tuple) else plain(value)
    )
    with pytest.raises(
        UserError, match=rf"ranks 0 and 1 do not see the same files \({SHARD}\); run.output_dir must be"
    ):
        kept.newest_whole()
    assert names(tmp_path) == ["latest", "round-000001"]


@pytest.mark.extended
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_while_checkpoints_are_written(tiny_world: Path, tmp_path: Path, kills: int) -> None:
    """At random moments: nothing beyond the last published checkpoint is lost, and no number differs."""
    changes = CHEAP | {"run__rounds": kills + 2, "run__checkpoint_every": 1, "evaluation__steps": 1}
    for name in ("whole", "killed"):
        write_config(tmp_path / f"{name}.yaml", run_settings(tiny_world, tmp_path / name, **changes))
    reports = {}
    for name, count in (("whole", 0), ("killed", kills)):
        trials = launch(1, str(tmp_path / f"{name}.yaml"), str(count), "0", script="tests.crash_trials", timeout=600)
        reports[name] = json.loads(trials.stdout.splitlines()[-1])
    assert reports["killed"]["kills"] == kills
    assert reports["killed"]["status"] == 0
    began = reports["killed"]["began"]
    assert len(began) == kills + 1
    # Each attempt went on where the newest published checkpoint was: one round a kill, at the most.
    log = (tmp_path / "killed.log").read_text()
    resumed = [int(done) for done in re.findall(r" resumed from .*, (\d+) rounds done", log)]
    assert log.count("starting with round 1") + len(resumed) == len(began)
    assert resumed == [start for start in began if start > 0]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


# ---- the store ----


def test_a_checkpoint_names_its_files(tmp_path: Path, group: Group) -> None:
    folder = store(tmp_path, group).save(7, STATE, ENTRIES)
    assert folder.name == "round-000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == {SHARD, "state.json"}
    assert manifest[SHARD]["bytes"] == (folder / SHARD).stat().st_size
    assert (tmp_path / "checkpoints" / "latest").read_text() == "round-000007\n"
    assert read_state(folder)["format"] == 4
    refuse_damaged(folder)
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) == 1
    bit_flip(folder / SHARD)
    with pytest.raises(UserError, match=f"{SHARD} is not what was written"):
        refuse_damaged(folder)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_found_and_set_aside(
    tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    kept = store(tmp_path, group)
    for done in (1, 2):
        kept.save(done, STATE, ENTRIES)
    file, damage = DAMAGES[kind]
    damage(tmp_path / "checkpoints" / "round-000002" / file)
    whole, damaged = kept.newest_whole()
    assert whole == tmp_path / "checkpoints" / "round-000001"
    assert "round-000002 is damaged" in caplog.text
    assert names(tmp_path) == ["latest", "round-000001", "round-000002"]  # a look changes nothing
    kept.go_back_to(whole, 1, damaged)
    assert names(tmp_path) == ["damaged-round-000002", "latest", "round-000001"]


@settings(max_examples=30, deadline=None)
@given(keep=st.integers(1, 7), rounds=st.lists(st.integers(1, 30), min_size=1, max_size=9, unique=True))
def test_the_newest_is_never_deleted(
    tmp_path_factory: pytest.TempPathFactory, group: Group, keep: int, rounds: list[int]
) -> None:
    """Also when a run went back, and later rounds lie there from before."""
    folder = tmp_path_factory.mktemp("keep")
    kept = store(folder, group, keep)
    for done in rounds:
        before = set(names(folder)) if (folder / "checkpoints").exists() else set()
        kept.save(done, STATE, ENTRIES)
        now = [name for name in names(folder) if name.startswith("round-")]
        assert f"round-{done:06d}" in now
        earlier = [name for name in now if name < f"round-{done:06d}"]
        were = sorted(name for name in before if "round-000000" < name < f"round-{done:06d}")
        assert earlier == were[max(0, len(were) - (keep - 1)) :]
        assert {name for name in before if name > f"round-{done:06d}" and name.startswith("round-")} <= set(now)


def test_what_a_kill_left_is_never_taken_and_goes_away(tmp_path: Path, group: Group) -> None:
    kept = store(tmp_path, group)
    kept.save(1, STATE, ENTRIES)
    for name in (".writing-round-000099", ".deleting-round-000098"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert kept.newest_whole()[0] == tmp_path / "checkpoints" / "round-000001"
    kept.save(2, STATE, ENTRIES)
    assert names(tmp_path) == ["latest", "round-000001", "round-000002"]


def test_a_checkpoint_makes_the_batch_script_forget_lost_ranks(
    tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that loses a rank now and then gets on; one that dies before each checkpoint is given up."""
    losses = tmp_path / ".opd-ds-losses-7"
    monkeypatch.setenv("OPD_DS_RESTARTS_FILE", str(losses))
    losses.write_text("3\n")
    checkpoints = store(tmp_path, group)
    checkpoints.save(1, STATE, ENTRIES)
    assert not losses.exists()
    checkpoints.save(2, STATE, ENTRIES)  # nothing was lost in between
    assert names(tmp_path)[-2:] == ["round-000001", "round-000002"]


@pytest.mark.parametrize("where", ["shard", "state", "draft"])
def test_a_full_disk_leaves_the_last_one_intact(
    tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kept = store(tmp_path, group)
    first = kept.save(1, STATE, ENTRIES)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr("opd_ds.checkpoint.store.write_shard", full)
        elif where == "state":
            patch.setattr(Path, "write_text", full)
        else:
            patch.setattr(Path, "mkdir", full)
        with pytest.raises(UserError, match=r"round 2 could not .*No space left.* MiB free.*round-000001 is intact"):
            kept.save(2, STATE, ENTRIES)
    assert names(tmp_path) == ["latest", "round-000001"]
    refuse_damaged(first)
    kept.save(2, STATE, ENTRIES)
    assert names(tmp_path) == ["latest", "round-000001", "round-000002"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_real_disk_that_fills_up(tmp_path: Path, group: Group) -> None:
    """Through safetensors, whose error has another type."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    try:
        kept = store(small, group)
        first = kept.save(1, STATE, ENTRIES)
        with pytest.raises(UserError, match=r"No space left on device .*round-000001 is intact"):
            kept.save(2, STATE, {"master/0/w": torch.zeros(1_000_000)})
        assert names(small) == ["latest", "round-000001"]
        refuse_damaged(first)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_in_the_background_a_round_does_not_wait(tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_ds.checkpoint.store import write_shard

    go = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert go.wait(30)
        return write_shard(*arguments)

    monkeypatch.setattr("opd_ds.checkpoint.store.write_shard", slow)
    kept = store(tmp_path, group, in_background=True)
    kept.save(1, STATE, ENTRIES)
    kept.publish_if_written()
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    go.set()
    kept.save(2, STATE, ENTRIES)  # waits for the one before
    assert latest_checkpoint(tmp_path / "checkpoints") == kept.place(1)
    kept.finish()
    assert names(tmp_path) == ["latest", "round-000001", "round-000002"]


def test_a_failure_in_the_background_is_raised(tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(tmp_path, group, in_background=True)
    kept.save(1, STATE, ENTRIES)
    kept.finish()

    def broken(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("opd_ds.checkpoint.store.write_shard", broken)
    kept.save(2, STATE, ENTRIES)
    with pytest.raises(UserError, match=r"Input/output error; round-000001 is intact"):
        kept.finish()
    assert names(tmp_path) == ["latest", "round-000001"]


def test_a_run_with_background_checkpoints_is_the_same_run(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path
) -> None:
    expected = run("plain", deepspeed=ALL_SHARDED)
    assert run("background", deepspeed=ALL_SHARDED, run__checkpoint_in_background=True) == expected
    assert names(tmp_path / "background") == names(tmp_path / "plain")
    for name in ("round-000002", "round-000004"):
        ours, theirs = (ShardReader(tmp_path / kind / "checkpoints" / name) for kind in ("background", "plain"))
        for parameter in theirs.parameters():
            assert torch.equal(ours.read("master", parameter, 0, 8), theirs.read("master", parameter, 0, 8))


def test_an_older_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"round": 3}')
    with pytest.raises(UserError, match="format 1; this version of opd-ds reads format 4"):
        read_state(tmp_path)


# ---- shards ----


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 40), written=st.integers(1, 5), read=st.integers(1, 5))
def test_any_cut_is_put_together_from_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int, written: int, read: int
) -> None:
    """Written in random pieces by some ranks, read in random pieces by others."""
    folder = tmp_path_factory.mktemp("cuts")
    whole = torch.randn(size)

    def cuts(parts: int) -> list[tuple[int, int]]:
        inner = sorted(data.draw(st.lists(st.integers(0, size), min_size=parts - 1, max_size=parts - 1)))
        return list(zip([0, *inner], [*inner, size], strict=True))

    for rank, (start, end) in enumerate(cuts(written)):
        pieces = {f"master/{start}/block/w": whole[start:end].clone()} if start < end else {}
        save_file(pieces, folder / f"shard-{rank:05d}-of-{written:05d}.safetensors")
    shards = ShardReader(folder)
    parts = [shards.read("master", "block/w", start, end - start) for start, end in cuts(read)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_hole_is_found(tmp_path: Path) -> None:
    save_file({"master/0/w": torch.zeros(4), "master/6/w": torch.zeros(4)}, tmp_path / SHARD)
    with pytest.raises(DamagedCheckpointError, match="master of 'w' has 8 of the elements 0 to 10"):
        ShardReader(tmp_path).read("master", "w", 0, 10)
    with pytest.raises(DamagedCheckpointError, match="ema of 'w' has 0"):
        ShardReader(tmp_path).read("ema", "w", 0, 4)


def test_nothing_in_a_checkpoint_can_run_code(run: Callable[..., list[dict[str, float]]], tmp_path: Path) -> None:
    """JSON and safetensors only: no pickle to load, with or without `weights_only`."""
    run("out")
    files = [file for file in (tmp_path / "out" / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ""}
    assert not [file for file in files if file.read_bytes()[:2] in (b"PK", b"\x80\x02")]


def test_the_log_of_a_damaged_checkpoint_says_why(
    tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path, group)
    kept.save(1, STATE, ENTRIES)
    damaged = kept.save(2, STATE, ENTRIES)
    cut_off(damaged / SHARD)
    with caplog.at_level(logging.WARNING):
        assert kept.newest_whole()[0] == kept.place(1)
    assert f"round-000002 is damaged ({SHARD} has" in caplog.text
