"""`model.sequence_parallel`: ranks that share sequences train what one rank trains that has them whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

from opd_ds.testing.tiny import flux, wan
from opd_ds.testing.tiny.sd3 import PROMPTS
from tests.ranks import TRAIN_MANY, launch
from tests.runs import assert_close, metrics
from tests.tiny import run_settings, write_config, write_lora

WAN_TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "proj_out")  # proj_out is where diffusers gathers
FLUX_TARGETS = ("attn.to_q", "attn.to_out.0", "proj_mlp", "x_embedder")
# An odd number of samples, random steps, several micro-batches: the hardest case of invariant 1.
HARD: dict[str, Any] = {
    "run__rounds": 2,
    "rollout__samples": 3,
    "rollout__kernel": "flow",
    "rollout__noise_level": 0.5,
    "rollout__micro_batch": 2,
    "rollout__steps": 3,
    "rollout__trained_steps": {"queries": 2},
    "train__micro_batch": 2,
    "student__lora__targets": ["to_q"],
}


def write_worlds(root: Path) -> dict[str, dict[str, Any]]:
    """Changes to a run's settings, by family."""
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    found = {}
    for name, tiny, kind, targets, size in (
        ("wan", wan, WanTransformer3DModel, WAN_TARGETS, {"height": 64, "width": 64, "frames": 5}),
        ("flux", flux, FluxTransformer2DModel, FLUX_TARGETS, {"height": 16, "width": 16, "max_text_length": 16}),
    ):
        base = tiny.write(root / name / "base", heads=4)
        full = tiny.write(root / name / "other", seed=5, heads=4)
        adapter = write_lora(base, root / name / "adapter", kind=kind, targets=targets)
        task = {"prompts": str(prompts)}
        found[name] = {
            "model": {"family": name, "path": str(base), **size},
            "tasks": {
                "one": {"teacher": {"path": str(full), "guidance": 1.0}, **task},
                "two": {"teacher": {"path": str(adapter), "guidance": 3.0}, **task},
            },
            "student__lora__targets": list(targets),
        }
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sequences")
    worlds = write_worlds(root)

    def file(name: str, family: str, degree: int, **changes: Any) -> str:
        settings = run_settings(root, root / name, **HARD | worlds[family] | changes)
        settings["model"]["sequence_parallel"] = degree
        return str(write_config(root / f"{name}.yaml", settings))

    launch(
        1,
        *(
            file(f"plain-{family}-{kind}", family, 1, student__kind=kind)
            for family in worlds
            for kind in ("full", "lora")
        ),
        script=TRAIN_MANY,
    )
    launch(
        2,
        *(
            file(f"two-{family}-{kind}", family, 2, student__kind=kind)
            for family in worlds
            for kind in ("full", "lora")
        ),
        script=TRAIN_MANY,
    )
    return root


@pytest.mark.multirank
@pytest.mark.parametrize("family", ["wan", "flux"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_same_is_trained(runs: Path, family: str, kind: str) -> None:
    assert_close(metrics(runs / f"two-{family}-{kind}"), metrics(runs / f"plain-{family}-{kind}"))
