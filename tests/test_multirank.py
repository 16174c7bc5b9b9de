"""Several ranks, gloo on CPU: same numbers, exact resume, one message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from opd_ds.testing.train_many import under_launcher
from tests.ranks import SET_BY_LAUNCHERS, TRAIN_MANY, launch, start
from tests.runs import assert_close, metrics, wait_for_rounds
from tests.tiny import ALL_SHARDED, run_settings, write_config

pytestmark = pytest.mark.multirank


# Samples do not divide by 2, steps are random queries, after which rollouts stop, the kernel is stochastic: the hardest
# case for invariant 1.
HARD: dict[str, Any] = {
    "run__rounds": 2,
    "rollout__samples": 5,
    "rollout__steps": 3,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.5,
    "rollout__trained_steps": {"queries": 2},
}


@pytest.fixture(scope="module")
def reference(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One rank, no ZeRO."""
    folder = tmp_path_factory.mktemp("reference")
    settings = run_settings(tiny_world, folder / "out", deepspeed="zero0", **HARD)
    launch(1, "--config", str(write_config(folder / "run.yaml", settings)))
    return metrics(folder / "out")


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
KINDS = ("full", "lora")
# Rounds that cost little, and enough of them for a kill in between.
KILLED = {"run__rounds": 7, "run__checkpoint_every": 2, "rollout__steps": 1}


@pytest.fixture(scope="module")
def on_two_ranks(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders, by name, of runs on two ranks, all in one process group; beside each its config, <name>.yaml."""
    root = tmp_path_factory.mktemp("two")
    settings = {name: HARD | changes for name, changes in CUTS.items()}
    for placement in PLACEMENTS:
        teacher = {"path": str(tiny_world / "base"), "guidance": 2.0, "placement": placement}
        task = {"teacher": teacher, "prompts": str(tiny_world / "prompts.txt")}
        settings[placement] = {"precision": "bf16", "tasks": {"self": task}, "run__rounds": 2}
    for kind in KINDS:
        settings[f"whole {kind}"] = {"student__kind": kind, **KILLED}
        task = {"teacher": str(tiny_world / "other"), "prompts": str(tiny_world / "prompts.txt")}
        settings[f"exported {kind}"] = {
            "student__kind": kind,
            "student__ema": {"decay": 0.5},
            "tasks": {"one": task | {"eval_prompts": str(tiny_world / "prompts.txt")}},
            "evaluation__grid_prompts": 2,
            "optimizer__lr": 1e-2,
        }
    files = [
        write_config(root / f"{name}.yaml", run_settings(tiny_world, root / name, **changes))
        for name, changes in settings.items()
    ]
    launch(2, *map(str, files), script=TRAIN_MANY)
    return root


@pytest.mark.parametrize("name", CUTS)
def test_two_ranks_train_what_one_rank_trains(reference: list[dict[str, float]], on_two_ranks: Path, name: str) -> None:
    """Invariant 1, with a remainder: same losses, KLs and gradient norms, the second round's after an update."""
    assert_close(metrics(on_two_ranks / name), reference)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_its_own_teacher_is_exactly_zero_on_two_ranks_in_bf16(on_two_ranks: Path, placement: str) -> None:
    assert [row["loss"] for row in metrics(on_two_ranks / placement)] == [0.0, 0.0]


@pytest.mark.extended
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_and_resume_is_bit_for_bit(tiny_world: Path, tmp_path: Path, on_two_ranks: Path, kind: str) -> None:
    """Invariant 2: a rank is killed within a round; the resumed rounds equal the uninterrupted ones."""
    changes = {"student__kind": kind, **KILLED}
    folder = tmp_path / "killed"
    file = write_config(tmp_path / "run.yaml", run_settings(tiny_world, folder, **changes))
    ranks = start(2, "--config", str(file))
    wait_for_rounds(folder, 3)
    ranks.processes[1].send_signal(signal.SIGKILL)
    assert ranks.wait(60) != 0
    assert len(metrics(folder)) < KILLED["run__rounds"]
    # A draft that the kill may have left is never taken for a checkpoint.
    (folder / "checkpoints" / ".writing-round-000099").mkdir()

    launch(2, "--config", str(file), "--resume", "auto")
    assert metrics(folder) == metrics(on_two_ranks / f"whole {kind}")


def test_exports_load_in_diffusers_and_draw_the_students_pictures(tiny_world: Path, on_two_ranks: Path) -> None:
    """Full: a folder; LoRA: a file for load_lora_weights. Both give the very image that the run's own grid shows."""
    for kind in KINDS:
        folder = on_two_ranks / f"exported {kind}"
        if kind == "full":
            pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "export")
        else:
            pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
            untrained = _picture(pipeline)
            pipeline.load_lora_weights(folder / "export")
        drawn = _picture(pipeline)
        # The first tile of the grid: 16 pixels drawn 96 wide, right of the labels and below the header.
        tile = Image.open(folder / "grid.png").crop((150, 48, 246, 144)).resize((16, 16), Image.Resampling.NEAREST)
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


def test_a_run_leaves_what_is_promised(on_two_ranks: Path) -> None:
    folder = on_two_ranks / "stage 0"
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("round", "loss", "grad_norm", "task/one/kl", "task/two/kl", "samples_per_s", "seconds/rollout"):
        assert key in row
    for name in ("config.yaml", "summary.json", "tensorboard", "checkpoints", "export"):
        assert (folder / name).exists(), name
    assert os.listdir(folder / "tensorboard")


def test_a_refused_resume_is_one_line_of_all_ranks(on_two_ranks: Path, tmp_path: Path) -> None:
    """What is refused: tests/test_checkpoint.py."""
    shutil.copytree(on_two_ranks / "whole full" / "checkpoints", tmp_path / "out" / "checkpoints")
    changes = (f"run.output_dir={tmp_path / 'out'}", "rollout.steps=2")
    options = [word for change in changes for word in ("--set", change)]
    ended = launch(2, "--config", str(on_two_ranks / "whole full.yaml"), "--resume", "auto", *options, check=False)
    assert ended.returncode != 0
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("opd-ds: error:"))
    assert "rollout.steps was 1 and is now 2" in line
    assert "Traceback" not in ended.stdout


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
    ended = launch(2, script=str(script), check=False)  # a collective would wait for 40 minutes
    assert ended.returncode != 0
    errors = [line for line in ended.stdout.splitlines() if "opd-ds: error:" in line]
    assert len(errors) == 1, ended.stdout[-3000:]
    assert "[rank 1] tasks.one.teacher.path = './gone': no such file" in errors[0]


# ---- under the deepspeed launcher itself, which reads exit codes, hands on signals and ends ranks ----


def under_deepspeed(*arguments: str) -> subprocess.Popen[str]:
    """Two ranks of a script, or of `--module NAME`, as users start them."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS}
    return subprocess.Popen(
        [*under_launcher(2), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.extended
def test_sigterm_saves_and_the_run_goes_on(tiny_world: Path, tmp_path: Path) -> None:
    changes = {"run__rounds": 400, "run__checkpoint_every": 1000, "rollout__steps": 1}
    file = write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out", **changes))
    process = under_deepspeed("--module", "opd_ds.cli", "train", "--config", str(file))
    wait_for_rounds(tmp_path / "out", 2)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if any(word.startswith("--local_rank") for word in child.cmdline())]
    assert len(ranks) == 2
    left = Path("/dev/shm").glob(f"deepspeed_*_{os.getuid()}_*_{ranks[0].environ()['MASTER_PORT']}_*")
    assert not list(left), "DeepSpeed's op for CPUs would leave them for ever"
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out[-3000:]
    done = len(metrics(tmp_path / "out"))
    assert f"interrupted after round {done}" in out
    assert (tmp_path / "out" / "checkpoints" / f"round-{done:06d}").is_dir()
    launch(2, "--config", str(file), "--resume", "auto", "--set", f"run.rounds={done + 1}")
    assert [row["round"] for row in metrics(tmp_path / "out")] == list(range(1, done + 2))
