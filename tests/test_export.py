"""`opd-ds export`: what a run exports at its end, the last weights, a merged LoRA; and a card beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import opd_ds
from opd_ds.checkpoint.model_card import model_card
from opd_ds.checkpoint.store import read_state
from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.diffusion import kernel
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.diffusion.rollout import rollout
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.merge.files import write_lora
from opd_ds.models import ModelFamily, lora
from opd_ds.models.sd3 import SD3
from opd_ds.runs.export import checkpointed_student
from opd_ds.runs.train import train
from opd_ds.utils.hashing import weights_sha256
from tests.test_checkpoint import cut_off
from tests.tiny import PROMPTS, TARGETS, run_settings

LORA_FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _umask() -> Iterator[None]:
    """One that is nobody's default, so that a fixed mode is noticed."""
    before = os.umask(0o026)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def trained(
    tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, group: Group
) -> Callable[[str], tuple[Path, Path]]:
    """Output folder and last checkpoint of a short run of either kind."""
    root, done = tmp_path_factory.mktemp("export"), {}

    def run(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            changes: dict[str, Any] = {"student__kind": kind, "optimizer__lr": 1e-2, "student__ema": {"decay": 0.5}}
            train(DistilConfig.model_validate(run_settings(tiny_world, root / kind, **changes)), group)
            done[kind] = root / kind
        return done[kind], done[kind] / "checkpoints" / "round-000003"

    return run


def export(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception


@pytest.mark.parametrize(("kind", "file"), [("full", FULL_FILE), ("lora", LORA_FILE)])
def test_a_checkpoint_gives_what_the_run_exported(trained: Any, tmp_path: Path, kind: str, file: str) -> None:
    run, checkpoint = trained(kind)
    export(checkpoint, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / file), load_file(run / "export" / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    export(checkpoint, tmp_path / "raw", "--raw")
    last = load_file(tmp_path / "raw" / file)
    assert any(not torch.equal(ours[name], value) for name, value in last.items())


def drawn(pipeline: StableDiffusion3Pipeline, family: ModelFamily) -> Tensor:
    """Latents of three prompts, by diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": family.height, "width": family.width}
    latents = SampleNoise([1, 2, 3], family.latent_shape).draw(slice(None))
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": 10, "latents": latents}
    return pipeline(PROMPTS[:3], output_type="latent", **call, **size).images


def rolled_out(checkpoint: Path, family: ModelFamily, *, averaged: bool) -> Tensor:
    """The same by the student as it is in the checkpoint."""
    student = checkpointed_student(family, checkpoint, averaged=averaged)
    cond, uncond = family.encode(PROMPTS[:3]), family.encode([""])
    with torch.no_grad():
        return rollout(
            lambda x, sigma, rows, step: family.guided_velocity(student, x, sigma, cond, uncond, 2.0),
            SampleNoise([1, 2, 3], family.latent_shape),
            kernel("euler").coefficients(family.sigmas(4)),
            family.sigmas(4),
            device=torch.device("cpu"),
        ).final


@pytest.mark.parametrize(
    ("kind", "options"),
    [("full", []), ("lora", []), ("lora", ["--merge"]), ("lora", ["--format", "peft"])],
    ids=["full", "lora", "merged", "peft"],
)
def test_what_the_card_loads_draws_what_the_student_draws(
    trained: Any, tiny_world: Path, tmp_path: Path, kind: str, options: list[str]
) -> None:
    """Averaged and last weights; the code in the card is run as it stands."""
    _, checkpoint = trained(kind)
    family = SD3(tiny_world / "base", dtype=torch.float32, device=torch.device("cpu"), max_text_length=10)
    found = []
    for flag in ("--ema", "--raw"):
        export(checkpoint, tmp_path / flag, flag, *options)
        code = (tmp_path / flag / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code, names)
        found.append(drawn(names["pipeline"], family))
        wanted = rolled_out(checkpoint, family, averaged=flag == "--ema")
        torch.testing.assert_close(found[-1], wanted, rtol=0, atol=1e-4)
    plain = drawn(StableDiffusion3Pipeline.from_pretrained(tiny_world / "base"), family)
    for one, other in ((found[0], found[1]), (found[0], plain), (found[1], plain)):
        assert (one - other).abs().max() > 1e-3


def test_a_peft_folder_is_a_teacher_again(trained: Any, tiny_world: Path, tmp_path: Path) -> None:
    _, checkpoint = trained("lora")
    export(checkpoint, tmp_path / "peft", "--format", "peft", "--dtype", "bf16")
    export(checkpoint, tmp_path / "diffusers")
    config, peft = lora.read_adapter(tmp_path / "peft")
    _, diffusers = lora.read_adapter(tmp_path / "diffusers", "StableDiffusion3Pipeline")
    assert config.base_model_name_or_path == str(tiny_world / "base")
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 4, set(TARGETS))
    assert peft.keys() == diffusers.keys()
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, diffusers[k].bfloat16()) for k, value in peft.items()
    )


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_dtype_is_that_of_the_weights(trained: Any, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    _, checkpoint = trained("full")
    export(checkpoint, tmp_path / "out", "--dtype", dtype)
    export(checkpoint, tmp_path / "exact", "--dtype", "fp32")
    rounded, exact = load_file(tmp_path / "out" / FULL_FILE), load_file(tmp_path / "exact" / FULL_FILE)
    assert {value.dtype for value in rounded.values()} == {expected}
    assert all(torch.equal(rounded[key], value.to(expected)) for key, value in exact.items())
    assert f"dtype=torch.{str(expected).removeprefix('torch.')})" in (tmp_path / "out" / "README.md").read_text()


def test_files_have_the_mode_that_the_umask_allows(trained: Any, tmp_path: Path) -> None:
    written = [folder for kind in ("full", "lora") for folder in trained(kind)]
    for name, options in (("peft", ["--format", "peft"]), ("merged", ["--merge"]), ("lora", [])):
        export(written[-1], tmp_path / name, *options)
    export(written[1], tmp_path / "full")
    write_lora(tmp_path / "source", {"x.weight": (torch.ones(1, 2), torch.ones(2, 1))}, None)
    for folder in (*written, tmp_path):
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert any(file.suffix == ".safetensors" for file in files)
        assert {(file, oct(file.stat().st_mode & 0o777)) for file in files} == {(file, "0o640") for file in files}


def test_a_run_stands_for_its_newest_checkpoint(trained: Any, tmp_path: Path) -> None:
    run, checkpoint = trained("lora")
    assert opd_ds.export_checkpoint(run, tmp_path / "run") == checkpoint
    with pytest.raises(UserError, match=r"this is a run; name a checkpoint, as \S+/round-000003$"):
        read_state(run)  # of a resume
    opd_ds.export_checkpoint(checkpoint, tmp_path / "checkpoint")
    first, second = (load_file(tmp_path / name / LORA_FILE) for name in ("run", "checkpoint"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_says_what_it_is(trained: Any, tiny_world: Path, tmp_path: Path) -> None:
    _, checkpoint = trained("full")
    export(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "full weights after 3 rounds, averaged (EMA)" in card
    for role, folder in (("teacher of one", "other"), ("teacher of two", "adapter"), ("base", "base")):
        assert f"| {role} | `{tiny_world / folder}` | `{weights_sha256(tiny_world / folder)}` |" in card
    assert "\nseed: 0\n" in card
    assert f"Made with opd_ds {opd_ds.__version__}, diffusers " in card
    assert front_matter(tmp_path / "out") == {
        "library_name": "diffusers",
        "tags": ["opd_ds", "text-to-image"],
    }
    assert "## Results" not in card  # nothing was evaluated


def test_the_card_has_the_scores_of_these_weights_only(trained: Any, tmp_path: Path) -> None:
    """Without held-out prompts a run keeps none; these are put there as it would."""
    run, checkpoint = trained("lora")
    rows = [{"round": 2, "one/ocr": 0.25}, {"round": 3, "one/ocr": 0.5}]
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(checkpoint, tmp_path / "scores")
    card = (tmp_path / "scores" / "README.md").read_text()
    assert "| one/ocr | 0.500 |" in card
    assert "0.250" not in card
    entry = {"n": 9, "nan": 0, "mean": 0.5, "ci95": [0.4, 0.6], "per_prompt": [], "per_picture": []}
    results = {
        "format": 1,
        "sets": {"one": {"own": ["ocr"]}},
        "scores": {"base": {"one": {"ocr": entry | {"mean": None}}}, "student": {"one": {"ocr": entry}}},
        "normalised_average": {"base": None, "student": 1.0},
    }
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "results.json").write_text(json.dumps(results))
    try:
        export(checkpoint, tmp_path / "results")
        export(checkpoint, tmp_path / "raw", "--raw")
    finally:
        (run / "eval" / "results.json").unlink()
        (run / "scores.jsonl").unlink()
    assert "| student | 0.500 ±0.100 | 1.000 |" in (tmp_path / "results" / "README.md").read_text()
    assert "0.500" not in (tmp_path / "raw" / "README.md").read_text()  # scored were the averaged weights


def test_the_hub_learns_of_a_base_it_knows(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: community\ntags: [x]\n---\n# Name\n")
    facts: dict[str, Any] = {"relation": "adapter", "tags": ["lora"], "sources": [], "settings": {}, "code": ""}
    card = model_card("A", "b", base=str(snapshot), base_folder=snapshot, **facts)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "diffusers",
        "license": "other",
        "license_name": "community",
        "base_model": "org/name",
        "base_model_relation": "adapter",
        "tags": ["opd_ds", "lora"],
    }
    assert "base_model: org/name" in model_card("A", "b", base="org/name", base_folder=None, **facts)
    assert "base_model" not in model_card("A", "b", base="./local", base_folder=tmp_path, **facts)


def test_what_cannot_be_exported_is_refused(trained: Any, tmp_path: Path) -> None:
    run, checkpoint = trained("full")
    with pytest.raises(UserError, match="no LoRA to merge"):
        export(checkpoint, tmp_path / "out", "--merge")
    for options, message in {
        ("--format", "peft"): "is for a LoRA by itself",
        ("--format", "pfet"): r"'pfet': unknown; allowed: diffusers, peft. Did you mean 'peft'\?",
        ("--dtype", "f32"): r"'f32': unknown; allowed: fp32, bf16, fp16. Did you mean 'fp32'\?",
    }.items():
        with pytest.raises(UserError, match=message):
            export(checkpoint, tmp_path / "out", *options)
    state = checkpoint / "state.json"
    kept = state.read_text()
    state.write_text(json.dumps(json.loads(kept) | {"copies": {}}))
    try:
        with pytest.raises(UserError, match=r"keeps no averaged weights, as student\.ema\.decay was 0; give --raw"):
            export(checkpoint, tmp_path / "out")
    finally:
        state.write_text(kept)
    with pytest.raises(UserError, match="is not an empty folder"):
        export(checkpoint, run)
    with pytest.raises(UserError, match=r"^\S+: no state\.json there; give a folder named round-NNNNNN$"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"round-000005: no state\.json there; there are round-.*000003$"):
        export(checkpoint.with_name("round-000005"), tmp_path / "out")
    shard = checkpoint / "shard-00000-of-00001.safetensors"
    whole = shard.read_bytes()
    cut_off(shard)
    with pytest.raises(UserError, match=r"round-000003: damaged \(shard-00000"):
        export(checkpoint, tmp_path / "out")
    shard.write_bytes(whole)
    assert not (tmp_path / "out").exists()
