"""`opd-ds export`: what a run exports at its end, the last weights, a merged LoRA; and a card beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from opd_ds.cli import app
from opd_ds.config import DistilConfig
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.run import train
from tests.test_checkpoint import cut_off
from tests.tiny import run_settings

LORA_FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "transformer/diffusion_pytorch_model.safetensors"


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


def test_a_merged_lora_is_the_base_with_the_lora(trained: Any, tiny_world: Path, tmp_path: Path) -> None:
    _, checkpoint = trained("lora")
    export(checkpoint, tmp_path / "lora")
    export(checkpoint, tmp_path / "merged", "--merge")
    adapted = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
    adapted.load_lora_weights(tmp_path / "lora")
    merged = SD3Transformer2DModel.from_pretrained(tmp_path / "merged", subfolder="transformer")
    base = SD3Transformer2DModel.from_pretrained(tiny_world / "base", subfolder="transformer")
    config = merged.config
    inputs = {
        "hidden_states": torch.randn(2, config.in_channels, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
        "timestep": torch.tensor([900.0, 100.0]),
    }
    with torch.no_grad():
        wanted, found, plain = (model(**inputs).sample for model in (adapted.transformer, merged, base))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged").vae is not None


def test_the_card_says_what_it_is(trained: Any, tiny_world: Path, tmp_path: Path) -> None:
    _, checkpoint = trained("full")
    export(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "full weights after 3 rounds, averaged (EMA)" in card
    assert f"| teacher of one | `{tiny_world / 'other'}` | `" in card
    assert f"| base | `{tiny_world / 'base'}` | `" in card


def test_what_cannot_be_exported_is_refused(trained: Any, tmp_path: Path) -> None:
    run, checkpoint = trained("full")
    with pytest.raises(UserError, match="no LoRA to merge"):
        export(checkpoint, tmp_path / "out", "--merge")
    with pytest.raises(UserError, match="is not an empty folder"):
        export(checkpoint, run)
    with pytest.raises(UserError, match=r"no state\.json there"):
        export(tmp_path, tmp_path / "out")
    shard = checkpoint / "shard-00000-of-00001.safetensors"
    whole = shard.read_bytes()
    cut_off(shard)
    with pytest.raises(UserError, match=r"round-000003: damaged \(shard-00000"):
        export(checkpoint, tmp_path / "out")
    shard.write_bytes(whole)
    assert not (tmp_path / "out").exists()
