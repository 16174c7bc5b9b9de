"""`model.sequence_parallel`: ranks that share sequences train what one rank trains that has them whole."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from PIL import Image

from opd_ds.cluster.roles import Roles
from opd_ds.cluster.world import World
from opd_ds.config.loading import parse_config
from opd_ds.engine import Alone
from opd_ds.errors import UserError
from opd_ds.evaluation.results import RESULTS_FILE, read_results
from opd_ds.plan.devices import DeviceKind, Devices
from opd_ds.plan.memory import layout, rows_per_rank
from opd_ds.runs.preflight import preflight
from opd_ds.testing.tiny import flux, wan
from opd_ds.testing.tiny.sd3 import PROMPTS
from tests.ranks import TRAIN_MANY, launch, start
from tests.runs import assert_close, metrics, wait_for_rounds
from tests.tiny import ALL_SHARDED, costs_of, run_settings, with_changes, write_config, write_lora

WAN_TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "proj_out")  # proj_out is where diffusers gathers
FLUX_TARGETS = ("attn.to_q", "attn.to_out.0", "proj_mlp", "x_embedder")
# An odd number of samples, random steps, several micro-batches: the hardest case of invariant 1.
HARD: dict[str, Any] = {
    "run__rounds": 2,
    "run__checkpoint_every": 1,
    "run__keep_checkpoints": 9,
    "deepspeed": ALL_SHARDED,
    "rollout__samples": 3,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.5,
    "rollout__micro_batch": 2,
    "rollout__steps": 3,
    "rollout__trained_steps": {"queries": 2},
    "train__micro_batch": 2,
}
PLACED = {placement: {f"tasks__{task}__teacher__placement": placement for task in ("one", "two")}
          for placement in ("offload", "zero_inference")}  # fmt: skip
# By name: on one rank what, ranks, ranks that share a sequence, and what else differs from the run on one rank.
RUNS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "wan stage 3": ("wan", 2, 2, {"rollout__gather": "once", "student__gradient_checkpointing": True}),
    "flux stage 2 fused": ("flux", 2, 2, {"deepspeed": "zero2", "rollout__mode": "fused"}),
    "wan stage 3 by layers": ("wan", 4, 2, {"rollout__gather": "per_layer", **PLACED["zero_inference"]}),
    "flux on four": ("flux rewarded", 4, 4, {}),
    "wan by NFT": ("wan nft", 2, 2, {}),
    "flux by GRPO-Guard": ("flux guard", 2, 2, {"deepspeed": "zero2"}),
}
LATE = "flux rewarded"  # learns a round late
# Worlds that learn from rewards alone.
LEARNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wan nft": (
        {"algorithm": "nft", "group": 3, "kl": 0.1},
        {"rollout__kernel": "euler", "rollout__noise_level": 0.0},
    ),
    "flux guard": ({"algorithm": "guard", "group": 3, "clip": 0.1}, {}),
}
# By what a run on four ranks goes on from, one rank's or two's.
RESUMED = {"wan": "wan stage 3", LATE: LATE}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Changes to a run's settings, by what is compared: a full Wan, a LoRA FLUX with shared teachers, and such a FLUX
    that learns late and from rewards as well, with an evaluation: ranks have fewer images than share them.
    """
    root = tmp_path_factory.mktemp("worlds")
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    found: dict[str, dict[str, Any]] = {}
    for name, tiny, kind, targets, size in (
        ("wan", wan, WanTransformer3DModel, WAN_TARGETS, {"height": 32, "width": 32, "frames": 5}),
        ("flux", flux, FluxTransformer2DModel, FLUX_TARGETS, {"height": 16, "width": 16, "max_text_length": 16}),
    ):
        base = tiny.write(root / name / "base", heads=4)
        adapter = write_lora(base, root / name / "adapter", kind=kind, targets=targets)
        teachers = {
            "one": {"path": str(tiny.write(root / name / "other", seed=5, heads=4)), "guidance": 1.0},
            "two": {"path": str(adapter), "guidance": 3.0},
        }
        found[name] = HARD | {
            "model": {"family": name, "path": str(base), **size},
            "tasks": {task: {"teacher": teacher, "prompts": str(prompts)} for task, teacher in teachers.items()},
            "student__lora__targets": list(targets),
            "student__kind": "full" if name == "wan" else "lora",
        }
    rewards = {f"tasks__{task}__rewards": ["jpeg_compressibility"] for task in ("one", "two")}
    held_out = {"tasks__one__eval_prompts": {"path": str(prompts), "limit": 2}, "evaluation__baselines": True}
    late = {"rollout__samples": 6, "scoring__late": 1, "reward_term": {"weight": 0.1, "group": 2}}
    found[LATE] = found["flux"] | rewards | held_out | late
    for name, (teach, changes) in LEARNED.items():
        learned = {"prompts": str(prompts), "rewards": [f"{Path(__file__).parent / 'brightness.py'}:brightness"]}
        found[name] = found[name.split()[0]] | changes | {"tasks": {"one": learned}, "teach": teach}
    return found


def settings(folder: Path, world: dict[str, Any], ranks: int = 1, **changes: Any) -> dict[str, Any]:
    data = run_settings(folder, folder, **(json.loads(json.dumps(world)) | changes))
    return with_changes(data, {"model__sequence_parallel": ranks})


@pytest.fixture(scope="module")
def runs(worlds: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, by name: of each world on one rank, and of `RUNS`."""
    root = tmp_path_factory.mktemp("runs")

    def file(name: str, world: str, ranks: int = 1, **changes: Any) -> str:
        return str(write_config(root / f"{name}.yaml", settings(root / name, worlds[world], ranks, **changes)))

    launch(1, *(file(world, world) for world in worlds), script=TRAIN_MANY)
    for ranks in (2, 4):
        own = {name: run for name, run in RUNS.items() if run[1] == ranks}
        files = [file(name, world, sharing, **changes) for name, (world, _, sharing, changes) in own.items()]
        if ranks == 4:  # others than wrote the checkpoint, and of them others share sequences
            place = Path("checkpoints", "round-000001")
            for world, before in RESUMED.items():
                name = f"{world} resumed"
                shutil.copytree(root / before / place, root / name / place)
                changes = {"deepspeed": "zero0"} | (PLACED["offload"] if world == "wan" else {})
                files.append(f"{file(name, world, 4, **changes)}:auto")
        launch(ranks, *files, script=TRAIN_MANY)
    evaluated = file("evaluated", LATE, 2)
    launch(2, "--config", evaluated, "--no-defaults", "--model", "base", command="eval")
    return root


@pytest.mark.multirank
@pytest.mark.extended
@pytest.mark.parametrize("name", RUNS)
def test_the_same_is_trained(runs: Path, name: str) -> None:
    """Losses, KLs, gradient norms and scores are those of one rank, on 2 and 4."""
    ours, theirs = (
        # On policy the policy's loss is 0 but for rounding.
        [{key: value for key, value in row.items() if not key.endswith("/policy")} for row in metrics(runs / of)]
        for of in (name, RUNS[name][0])
    )
    assert_close(ours, theirs, rel=1e-3 if RUNS[name][0] in LEARNED else 1e-4)


@pytest.mark.multirank
@pytest.mark.extended
@pytest.mark.parametrize("world", RESUMED)
def test_a_run_goes_on_with_other_ranks(runs: Path, world: str) -> None:
    """Four ranks that share sequences go on from one or two, at another stage, with what the round before left."""
    assert_close(metrics(runs / f"{world} resumed"), metrics(runs / world)[1:])


@pytest.mark.multirank
@pytest.mark.extended
def test_an_evaluation_by_itself_scores_the_same(runs: Path) -> None:
    """`opd-ds eval` on two ranks, which draws with whole sequences."""
    found = {name: read_results(runs / name / "eval" / RESULTS_FILE)["scores"]["base"] for name in (LATE, "evaluated")}
    ((label, scores),) = found[LATE]["one"].items()
    assert found["evaluated"]["one"][label]["mean"] == pytest.approx(scores["mean"], rel=1e-3)


@pytest.mark.multirank
@pytest.mark.extended
def test_the_same_is_drawn_and_scored(runs: Path) -> None:
    """Ranks that share a sequence decode, store and score its images between them: each once."""
    folders = [runs / name for name in ("flux rewarded", "flux on four")]
    names = [sorted(file.relative_to(folder) for file in (folder / "eval").rglob("*.png")) for folder in folders]
    assert names[0] == names[1] != []
    for name in names[0]:
        pixels = [np.asarray(Image.open(folder / name)).astype(int) for folder in folders]
        assert abs(pixels[0] - pixels[1]).max() <= 1
    scores = [json.loads((folder / "summary.json").read_text())["models"] for folder in folders]
    for model, means in scores[0].items():
        assert scores[1][model]["one"] == pytest.approx(means["one"], rel=1e-3)


@pytest.mark.multirank
@pytest.mark.extended
def test_every_family_and_its_copy_share_sequences(tmp_path: Path) -> None:
    """Velocities, and gradients, which are sums over the ranks."""
    launch(2, str(tmp_path), script=str(Path(__file__).parent / "sequence_parallel_ranks.py"))
    found = json.loads((tmp_path / "differences.json").read_text())
    assert len(found) == 4
    for name, differences in found.items():
        assert differences["velocity"] < 1e-4, (name, differences)
        assert differences["gradient"] < 1e-3, (name, differences)


@pytest.mark.multirank
@pytest.mark.extended
def test_a_lost_rank_ends_the_run(worlds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The others wait for its tokens, inside a forward."""
    file = write_config(tmp_path / "run.yaml", settings(tmp_path, worlds["wan"], 2, run__rounds=100_000))
    ranks = start(2, "--config", str(file))
    wait_for_rounds(tmp_path, 1)
    ranks.processes[1].send_signal(signal.SIGKILL)
    assert ranks.processes[0].wait(60) != 0
    assert "rank 1" in ranks.output


def test_samples_are_divided_over_groups() -> None:
    roles = [Roles(World(rank=rank, size=6, local_size=6), sharing=2) for rank in range(6)]
    assert [(role.own.rank, role.drawing.rank, role.drawing.size) for role in roles] == [
        (0, 0, 3), (1, 0, 3), (2, 1, 3), (3, 1, 3), (4, 2, 3), (5, 2, 3),
    ]  # fmt: skip


def test_what_cannot_be_shared_is_refused(worlds: dict[str, dict[str, Any]], tiny_world: Path, tmp_path: Path) -> None:
    def check(world: str, ranks: int, processes: int = 4, **changes: Any) -> None:
        config = parse_config(settings(tmp_path, worlds[world], ranks, **changes))
        preflight(config, Alone(), World(size=processes, local_size=processes), None)

    check("wan", 2)
    for world, ranks, processes, message in (
        ("wan", 2, 3, r"sequence_parallel = 2 does not divide the ranks that train, 3; allowed: 1, 3"),
        ("wan", 3, 3, r"sequence_parallel = 3 does not divide the network's 4 attention heads; allowed: 1, 2, 4"),
    ):
        with pytest.raises(UserError, match=message):
            check(world, ranks, processes)
    short = worlds["flux"]["model"] | {"max_text_length": 9}
    with pytest.raises(
        UserError, match=r"2 does not divide the 9 tokens of a prompt \(model\.max_text_length\).* 1, 3"
    ):
        check("flux", 2, model=short)
    odd = worlds["wan"]["model"] | {"height": 48, "width": 48}
    with pytest.raises(UserError, match=r"4 does not divide the 18 tokens of a video; allowed: 1, 2, 3, 6, 9, 18"):
        check("wan", 4, model=odd)
    sd3 = parse_config(run_settings(tiny_world, tmp_path, model__sequence_parallel=2))
    with pytest.raises(UserError, match=r"sequence_parallel = 2: sequences of SD3 are not divided over"):
        preflight(sd3, Alone(), World(size=2, local_size=2), None)
    for changes, message in (
        ({"scoring__ranks": 1}, r"does not go with scoring\.ranks = 1: .*; set scoring\.ranks to 0, or model\.seq"),
        ({"scoring__micro_batch": "auto"}, r"scoring\.micro_batch = 'auto': every forward is made by several ranks"),
        ({"model__compile_blocks": True}, r"model\.compile_blocks = True.*set model\.compile_blocks to false"),
        ({"model__attention": "math"}, r"model\.attention = 'math'.*set model\.attention to 'auto'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(with_changes(settings(tmp_path, worlds["wan"], 2), changes))


def test_a_plan_divides_passes_and_not_samples(worlds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Four ranks in two groups have twice the samples of four ranks, and half of each pass."""
    devices = Devices(DeviceKind("GPU", 1e12, 1e12, 1e9, 1e6, 1e13), 4)
    configs = [parse_config(settings(tmp_path, worlds["wan"], ranks, rollout__samples=8)) for ranks in (1, 2, 3)]
    assert [rows_per_rank(config, devices, "one") for config in configs[:2]] == [2, 4]
    costs = [costs_of(config) for config in configs]
    whole, shared = (one.forward(1) for one in costs[:2])
    assert (shared.flops, shared.peak) == (whole.flops / 2, whole.peak / 2)
    notes = [layout(config, one, devices).notes for config, one in zip(configs[:2], costs, strict=False)]
    assert [any("model.sequence_parallel = 2: activations" in note for note in own) for own in notes] == [False, True]
    with pytest.raises(UserError, match="does not divide the ranks that train, 4"):
        layout(configs[2], costs[2], devices)
