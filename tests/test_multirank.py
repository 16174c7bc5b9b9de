"""Several ranks under the real deepspeed launcher, gloo on CPU: same numbers, exact resume, one message."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from opd_ds.runs.monitor import read_metrics
from tests.tiny import ALL_SHARDED, TRAIN_MANY, launch, run_settings, start, write_config

pytestmark = pytest.mark.multirank


def metrics(folder: Path) -> list[dict[str, float]]:
    """What must be equal: everything but times, rates, memory, and passes, which count samples that fill up."""
    rows = read_metrics(folder / "metrics.jsonl")
    measured = ("seconds/", "samples_per_s", "memory/", "passes/")
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def run(world: Path, folder: Path, ranks: int, *arguments: str, **changes: Any) -> list[dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    file = write_config(folder / "run.yaml", run_settings(world, folder / "out", **changes))
    launch(ranks, "--config", str(file), *arguments)
    return metrics(folder / "out")


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-4) -> None:
    assert [row["round"] for row in ours] == [row["round"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert value == pytest.approx(other[key], rel=rel), (key, mine, other)


# Samples do not divide by 2, steps are random queries, the kernel is stochastic: the hardest case for invariant 1.
HARD: dict[str, Any] = {
    "rollout__samples": 5,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.5,
    "rollout__trained_steps": {"queries": 3},
}


@pytest.fixture(scope="module")
def reference(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One rank, no ZeRO."""
    return run(tiny_world, tmp_path_factory.mktemp("reference"), 1, deepspeed="zero0", **HARD)


CUTS: dict[str, dict[str, Any]] = {
    "stage 0": {"deepspeed": "zero0"},
    "stage 1": {"deepspeed": "zero1", "train__micro_batch": 3},
    "stage 2 fused": {"deepspeed": "zero2", "rollout__mode": "fused", "rollout__micro_batch": 2},
    "stage 3, sharded teachers": {
        "deepspeed": ALL_SHARDED,
        "rollout__gather": "per_layer",
        "tasks__one__teacher__placement": "zero_inference",
        "tasks__two__teacher__placement": "zero_inference",
    },
    "stage 3, offloaded teacher": {
        "deepspeed": ALL_SHARDED,
        "rollout__gather": "once",
        "tasks__one__teacher__placement": "offload",
        "student__gradient_checkpointing": True,
    },
}
PLACEMENTS = ("resident", "zero_inference")
KILLED = {"run__rounds": 8, "run__checkpoint_every": 2}


@pytest.fixture(scope="module")
def on_two_ranks(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Metrics by name of runs on two ranks, all in one process group: most of a run here is its start."""
    root = tmp_path_factory.mktemp("two")
    settings = {name: HARD | changes for name, changes in CUTS.items()}
    for placement in PLACEMENTS:
        teacher = {"path": str(tiny_world / "base"), "guidance": 2.0, "placement": placement}
        task = {"teacher": teacher, "prompts": str(tiny_world / "prompts.txt")}
        settings[placement] = {"precision": "bf16", "tasks": {"self": task}, "run__rounds": 2}
    settings |= {f"whole {kind}": {"student__kind": kind, **KILLED} for kind in ("full", "lora")}
    files = [
        write_config(root / f"{number}.yaml", run_settings(tiny_world, root / name, **changes))
        for number, (name, changes) in enumerate(settings.items())
    ]
    launch(2, *map(str, files), script=TRAIN_MANY)
    return {name: metrics(root / name) for name in settings}


@pytest.mark.parametrize("name", CUTS)
def test_two_ranks_train_what_one_rank_trains(
    reference: list[dict[str, float]], on_two_ranks: dict[str, list[dict[str, float]]], name: str
) -> None:
    """Invariant 1, with a remainder: same losses, KLs and gradient norms over three rounds."""
    assert_close(on_two_ranks[name], reference)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_its_own_teacher_is_exactly_zero_on_two_ranks_in_bf16(
    on_two_ranks: dict[str, list[dict[str, float]]], placement: str
) -> None:
    assert [row["loss"] for row in on_two_ranks[placement]] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kill_9_and_resume_is_bit_for_bit(
    tiny_world: Path, tmp_path: Path, on_two_ranks: dict[str, list[dict[str, float]]], kind: str
) -> None:
    """Invariant 2: a rank is killed within a round; the resumed rounds equal the uninterrupted ones."""
    changes = {"student__kind": kind, **KILLED}
    expected = on_two_ranks[f"whole {kind}"]

    folder = tmp_path / "killed"
    folder.mkdir()
    file = write_config(folder / "run.yaml", run_settings(tiny_world, folder / "out", **changes))
    process = start(2, "--config", str(file))
    _wait_for_rounds(folder / "out", 3)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "opd_ds.cli" in " ".join(p.cmdline())]
    victim = next(p for p in ranks if "--local_rank=1" in p.cmdline())
    victim.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert len(metrics(folder / "out")) < 8
    # A draft that the kill may have left is never taken for a checkpoint.
    (folder / "out" / "checkpoints" / ".writing-round-000099").mkdir()

    launch(2, "--config", str(file), "--resume", "auto")
    assert metrics(folder / "out") == expected


def _wait_for_rounds(folder: Path, count: int, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and len(read_metrics(folder / "metrics.jsonl")) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} rounds within {timeout} s")


def test_sigterm_saves_and_the_run_goes_on(tiny_world: Path, tmp_path: Path) -> None:
    changes = {"run__rounds": 400, "run__checkpoint_every": 1000}
    file = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", **changes))
    process = start(2, "--config", str(file))
    _wait_for_rounds(tmp_path / "out", 2)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "opd_ds.cli" in " ".join(p.cmdline())]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{os.getuid()}_*")), "DeepSpeed leaves it behind for ever"
    for rank in (p for p in ranks if any(argument.startswith("--local_rank") for argument in p.cmdline())):
        rank.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out[-3000:]
    done = len(metrics(tmp_path / "out"))
    assert f"interrupted after round {done}" in out
    assert (tmp_path / "out" / "checkpoints" / f"round-{done:06d}").is_dir()
    launch(2, "--config", str(file), "--resume", "auto", "--set", f"run.rounds={done + 1}")
    assert [row["round"] for row in metrics(tmp_path / "out")] == list(range(1, done + 2))


def test_exports_load_in_diffusers_and_draw_the_students_pictures(tiny_world: Path, tmp_path: Path) -> None:
    """Full: a folder; LoRA: a file for load_lora_weights. Both give the very picture that the run's own grid shows."""
    for kind in ("full", "lora"):
        tasks = {"one": {"teacher": str(tiny_world / "other"), "prompts": str(tiny_world / "prompts.txt")}}
        tasks["one"]["eval_prompts"] = str(tiny_world / "prompts.txt")  # type: ignore[index]
        folder = tmp_path / kind
        settings = {"student__kind": kind, "tasks": tasks, "evaluation__grid_prompts": 2, "optimizer__lr": 1e-2}
        settings["student__ema"] = {"decay": 0.5}
        run(tiny_world, folder, 2, **settings)
        export = folder / "out" / "export"
        if kind == "full":
            pipeline = StableDiffusion3Pipeline.from_pretrained(export)
        else:
            pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
            untrained = _picture(pipeline)
            pipeline.load_lora_weights(export)
        drawn = _picture(pipeline)
        # The first tile of the grid: 16 pixels drawn 96 wide, right of the labels and below the header.
        tile = (
            Image.open(folder / "out" / "grid.png").crop((150, 48, 246, 144)).resize((16, 16), Image.Resampling.NEAREST)
        )
        shown = torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255
        torch.testing.assert_close(drawn, shown, rtol=0, atol=1.01 / 255)
    assert not torch.allclose(drawn, untrained, atol=0.02)


def _picture(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    from opd_ds.diffusion.noise import SampleNoise, sample_seed

    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red 3 on blue",
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=SampleNoise([sample_seed(1234, 0, "evaluation/a red 3 on blue", 0)], (4, 8, 8)).draw(slice(None)),
        max_sequence_length=10,
        height=16,
        width=16,
        output_type="np",
    ).images[0]
    return torch.from_numpy(picture).permute(2, 0, 1)


# ---- refusals ----


def test_a_resume_of_another_run_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    changes = {"run__rounds": 1, "run__checkpoint_every": 1}
    run(tiny_world, tmp_path, 2, **changes)
    file = tmp_path / "run.yaml"

    def refusal(ranks: int, *arguments: str) -> str:
        ended = launch(ranks, "--config", str(file), *arguments, check=False)
        assert ended.returncode != 0
        lines = [line for line in ended.stdout.splitlines() if line.startswith("opd-ds: error:")]
        assert len(lines) == 1, ended.stdout[-3000:]
        assert "Traceback" not in ended.stdout
        return lines[0]

    # A start of one process is quicker, and what it refuses does not depend on their number.
    assert "already holds" in refusal(1)
    assert "rollout.steps was 4 and is now 5" in refusal(2, "--resume", "auto", "--set", "rollout.steps=5")
    other = refusal(1, "--resume", "auto", "--set", f"tasks.one.teacher={tiny_world / 'base'}")
    assert "tasks.one.teacher_sha256 was" in other
    assert "optimizer.lr was 0.001 and is now 0.002" in refusal(1, "--resume", "auto", "--set", "optimizer.lr=0.002")
    (tmp_path / "fewer.txt").write_text("a red 3\n")
    prompts = refusal(1, "--resume", "auto", "--set", f"tasks.one.prompts={tmp_path / 'fewer.txt'}")
    assert "tasks.one.prompts_sha256 was" in prompts


def test_a_rank_that_fails_alone_speaks_once_and_nobody_hangs(tiny_world: Path, tmp_path: Path) -> None:
    """Rank 1 finds another teacher file than rank 0 does: one line, with the rank, and an end."""
    data = run_settings(tiny_world, tmp_path / "out")
    data["tasks"]["one"]["teacher"]["path"] = "${TEACHER}"
    file = write_config(tmp_path / "run.yaml", data)
    script = tmp_path / "rank_dependent.py"
    script.write_text(
        "import os, pathlib, sys\n"
        f"text = pathlib.Path({str(file)!r}).read_text()\n"
        f"good = {str(tiny_world / 'other')!r}\n"
        "path = good if os.environ['RANK'] == '0' else './gone'\n"
        f"mine = pathlib.Path({str(tmp_path)!r}) / f\"run{{os.environ['RANK']}}.yaml\"\n"
        "mine.write_text(text.replace('${TEACHER}', path))\n"
        "sys.argv = ['opd-ds', 'train', '--config', str(mine)]\n"
        "from opd_ds.cli.main import main\n"
        "main()\n"
    )
    started = time.monotonic()
    ended = launch(2, script=str(script), check=False)
    assert ended.returncode != 0
    errors = [line for line in ended.stdout.splitlines() if "opd-ds: error:" in line]
    assert len(errors) == 1, ended.stdout[-3000:]
    assert "[rank 1] tasks.one.teacher.path = './gone': no such file" in errors[0]
    assert time.monotonic() - started < 120


def test_metrics_have_the_promised_keys(tiny_world: Path, tmp_path: Path) -> None:
    run(tiny_world, tmp_path, 2, run__rounds=1)
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    for key in ("round", "loss", "grad_norm", "task/one/kl", "task/two/kl", "samples_per_s", "seconds/rollout"):
        assert key in row
    for name in ("config.yaml", "summary.json", "tensorboard", "checkpoints", "export"):
        assert (tmp_path / "out" / name).exists(), name
    assert os.listdir(tmp_path / "out" / "tensorboard")
