"""`scoring.ranks`: teachers on ranks of their own; the others train what they would train without."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_ds.cluster.roles import Answering, Roles
from opd_ds.cluster.signals import RESTART
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.engine import Group
from opd_ds.engine.channel import packed, unpacked
from opd_ds.errors import UserError
from opd_ds.models import Conditioning
from opd_ds.plan.devices import DeviceKind, Devices
from opd_ds.plan.pipeline import overlapped
from opd_ds.plan.planner import best_split, make_plan
from opd_ds.runs.files import find_files
from opd_ds.runs.train import train
from tests.ranks import TRAIN_MANY, launch, start
from tests.runs import assert_close, metrics, wait_for_rounds
from tests.test_teach import NFT, settings
from tests.tiny import costs_of, run_settings, write_config

# Samples that divide by no number of ranks, random steps, several micro-batches, kept branches and an anchor.
HARD: dict[str, Any] = {
    "run__checkpoint_every": 1,
    "run__keep_checkpoints": 10,
    "run__rounds": 2,
    "rollout__samples": 5,
    "rollout__steps": 3,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.5,
    "rollout__micro_batch": 3,
    "rollout__trained_steps": {"queries": 2},
    "train__micro_batch": 3,
}
ONE_STEP = {"rollout__steps": 1}
SHARDED = {f"tasks__{task}__teacher__placement": "zero_inference" for task in ("one", "two")}


def test_every_rank_has_its_part() -> None:
    for networks in range(1, 5):
        for teachers in range(1, 5):
            for students in range(teachers, 7):
                plan = Answering(networks, teachers, students)
                plan.check()
                assert sorted({one for rank in range(teachers) for one in plan.held(rank)}) == list(range(networks))
                for network in range(networks):
                    for student in range(students):
                        assert student in plan.answered(plan.asked(network, student))
    # One student cannot keep three copies of one network busy.
    with pytest.raises(UserError, match=r"scoring\.ranks = 3: with 1 ranks .* 2 of them would have nothing .* to 1 at"):
        Answering(1, 3, 1).check()
    roles = [Roles(World(rank=rank, size=4, local_size=4), 1) for rank in range(4)]
    assert [(role.is_teacher, role.own.rank, role.own.size) for role in roles] == [
        (False, 0, 3), (False, 1, 3), (False, 2, 3), (True, 0, 1),
    ]  # fmt: skip


def test_a_message_arrives_as_it_was_sent() -> None:
    cond = Conditioning({"text": torch.randn(2, 3, dtype=torch.bfloat16), "mask": torch.tensor([[True, False]] * 2)})
    sent = {"cond": cond, "none": torch.empty(0, 4), "rows": [1, 2], "number": torch.tensor(3.5)}
    found = unpacked(packed(sent))
    assert found["rows"] == [1, 2]
    assert found["cond"].lengths == (1, 1)
    assert all(torch.equal(found["cond"].tensors[name], value) for name, value in cond.tensors.items())
    assert found["none"].shape == (0, 4)
    assert found["number"] == 3.5


def test_the_pipeline_of_a_round() -> None:
    """By hand: four visits at 0, 1, 2, 3; each asked for 2 s; training takes a second for each quarter."""
    phases = {"encode": 0.0, "rollout": 4.0, "score": 8.0, "train": 4.0, "step": 1.0}
    assert overlapped(phases, 4, 4) == pytest.approx(8 + 1 + 1)  # answers at 2, 4, 6, 8
    assert overlapped(phases | {"score": 0.0}, 4, 4) == pytest.approx(9.0)
    assert overlapped(phases, 1, 1) == pytest.approx(8 + 4 + 1)
    assert overlapped(phases, 4, 4, late=True) == pytest.approx(9.0)
    assert overlapped(phases | {"score": 20.0}, 4, 4, late=True) == pytest.approx(20.0)


def test_a_plan_puts_teachers_on_their_ranks(configured: Callable[..., DistilConfig]) -> None:
    """Their weights are there and nowhere else; a split is recommended where it saves a travel, and only then."""
    devices = Devices(DeviceKind("GPU", 1e12, 1e12, 1e9, 1e6, 1e13), 4)  # host memory is far from them
    travels = {f"tasks__{task}__teacher__placement": "offload" for task in ("one", "two")}
    config, apart = configured(rollout__samples=8, **travels), configured(rollout__samples=8, scoring__ranks=1)
    costs = costs_of(config)
    split = make_plan(apart, costs, devices)
    assert split.teachers is not None
    beside = make_plan(configured(rollout__samples=8), costs, devices)
    weights = [
        {part.name: part.nbytes for part in memory.device}.get("teachers", 0.0)
        for memory in (split.memory, split.teachers, beside.memory)
    ]
    assert weights[0] == 0
    assert weights[1] == weights[2] > 0
    assert split.seconds.total < sum(split.seconds.phases.values())
    plain = make_plan(config, costs, devices)
    found = best_split(plain, costs)
    assert found is not None
    assert found.config.scoring.ranks > 0
    assert found.seconds.total < plain.seconds.total


@pytest.fixture(scope="module")
def runs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, by name: on one rank without teacher ranks (plain-...), and with them on 2, 3 and 4 ranks."""
    root = tmp_path_factory.mktemp("ranks")
    prompts = str(tiny_world / "prompts.txt")
    anchor = {"path": str(tiny_world / "other"), "guidance": 2.0}
    held_out = {"path": prompts, "limit": 3}
    kinds: dict[str, dict[str, Any]] = {
        "hard": HARD | {"anchor": anchor},
        "late": HARD | {"scoring__late": 1, "run__rounds": 4},
        "drawn": ONE_STEP | {"run__rounds": 1, "evaluation__baselines": True, "tasks__one__eval_prompts": held_out},
    }

    def file(name: str, **changes: Any) -> str:
        return str(write_config(root / f"{name}.yaml", run_settings(tiny_world, root / name, **changes)))

    launch(1, *(file(f"plain-{kind}", **changes) for kind, changes in kinds.items()), script=TRAIN_MANY)
    launch(
        3, *(file(f"three-{kind}", scoring__ranks=1, **changes) for kind, changes in kinds.items()), script=TRAIN_MANY
    )
    four = {
        "four-hard": kinds["hard"],
        "four-sharded": kinds["hard"] | SHARDED | {"anchor__placement": "zero_inference"},
    }
    launch(4, *(file(name, scoring__ranks=2, **changes) for name, changes in four.items()), script=TRAIN_MANY)
    place = Path("checkpoints", "round-000002")
    shutil.copytree(root / "three-late" / place, root / "two-resumed" / place)
    launch(2, file("two-resumed", scoring__ranks=1, **kinds["late"]) + ":auto", script=TRAIN_MANY)
    return root


@pytest.mark.multirank
@pytest.mark.extended
@pytest.mark.parametrize("name", ["three-hard", "four-hard", "four-sharded", "three-late", "three-drawn"])
def test_the_same_is_trained(runs: Path, name: str) -> None:
    """Losses, KLs, gradient norms and scores, one teacher rank of three or two of four."""
    assert_close(metrics(runs / name), metrics(runs / f"plain-{name.split('-')[1].replace('sharded', 'hard')}"))


@pytest.mark.multirank
@pytest.mark.extended
def test_a_run_goes_on_with_other_roles(runs: Path) -> None:
    """What waits in a checkpoint (`scoring.late`), and all else: two ranks after three, and none are teachers."""
    assert_close(metrics(runs / "two-resumed"), metrics(runs / "plain-late")[2:])


@pytest.mark.multirank
@pytest.mark.extended
def test_teachers_draw_for_the_ranks_that_evaluate(runs: Path) -> None:
    """The images of the teacher are those that it draws beside the student."""
    images = [sorted((runs / name / "eval").rglob("*.png")) for name in ("plain-drawn", "three-drawn")]
    assert [one.name for one in images[0]] == [one.name for one in images[1]] != []


@pytest.mark.multirank
@pytest.mark.extended
def test_a_signal_ends_both_roles(tiny_world: Path, tmp_path: Path) -> None:
    """It reaches a rank that trains; the state is saved, and a teacher rank leaves with the same code."""
    changes = ONE_STEP | {"run__rounds": 100_000, "run__checkpoint_every": 100_000, "scoring__ranks": 1}
    ranks = start(
        2, "--config", str(write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path, **changes)))
    )
    wait_for_rounds(tmp_path, 1)
    ranks.processes[0].send_signal(signal.SIGUSR1)
    assert [process.wait(60) for process in ranks.processes] == [RESTART, RESTART]
    assert (tmp_path / "checkpoints" / "latest").is_file()


def test_what_teacher_ranks_cannot_do_is_refused(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    def config(**changes: Any) -> DistilConfig:
        return DistilConfig.model_validate(run_settings(tiny_world, tmp_path, scoring__ranks=1, **changes))

    with pytest.raises(UserError, match=r"scoring\.ranks = 1: the run has 1 rank, and at least one has to train"):
        find_files(config(), World())
    with pytest.raises(UserError, match=r"scoring\.ranks = 1: the run has 1 rank"):
        train(config(), group)
    for changes, message in (
        ({"rollout__mode": "fused"}, r"so scoring\.ranks = 1 is not possible; set scoring\.ranks to 0, or set rollout"),
        ({"objective__method": "sft"}, r"trains on what teachers draw, so scoring\.ranks = 1"),
        ({"tasks__one__teacher__placement": "offload"}, r"tasks\.one\.teacher\.placement = 'offload' travels"),
        ({"tasks__two__teacher__placement": "shared"}, r"'shared' lives in the student's network.*auto, resident or"),
        ({"scoring__ranks": 2, "tasks__one__teacher__placement": "zero_inference"}, r"for all of them or for none"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(run_settings(tiny_world, tmp_path, **{"scoring__ranks": 1, **changes}))
    with pytest.raises(UserError, match=r"scoring\.ranks = 1 is for teachers; learning from rewards has none"):
        parse_config(settings(tiny_world, tmp_path, NFT, scoring__ranks=1))
    # A LoRA of a LoRA student is no longer a part of the student's network.
    files = find_files(config(student__kind="lora"), World(size=2, local_size=2))
    assert {spec.settings.placement for spec in files.teachers.values()} == {"resident"}
