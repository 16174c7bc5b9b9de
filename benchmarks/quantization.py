"""`python -m benchmarks quantization`: what frozen weights in 8 and 4 bits weigh, and how wrong their velocities are.

Errors are measured in float32 on tiny networks with random weights, one a family, and on the miniature's trained base.
Bytes are counted of the published networks, from their configurations.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from benchmarks.family_trial import Trial
from opd_ds.config.paths import resolve_path
from opd_ds.config.teachers import QuantizedAs
from opd_ds.diffusion import kernel
from opd_ds.diffusion.objective import kl_weight, velocity_error
from opd_ds.models import FAMILIES, ModelFamily
from opd_ds.models.libraries import diffusers_class
from opd_ds.models.quantization import check_quantization, saved_bytes
from opd_ds.models.two_networks import PARTS, TwoNetworks
from opd_ds.plan.network import known_configs, known_models
from opd_ds.testing import family_checks as checks
from opd_ds.utils.markdown import markdown_table

KINDS: tuple[QuantizedAs, ...] = get_args(QuantizedAs)
MINIATURE = "package:miniature/assets/miniature_base"
STEPS, NOISE_LEVEL = 10, 0.7  # of the sampler `flow`, whose KL is measured
_GIB = 2**30

Row = dict[str, Any]


def bench(folder: Path, say: Callable[[str], None]) -> None:
    """Measure and count; `quantization.json` and `quantization.md`.

    Raises:
        UserError: torchao is not installed.
    """
    check_quantization("--quantize", "int8")
    shutil.rmtree(folder / "tiny", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    errors: dict[str, Row] = {}
    for name in FAMILIES:
        trial = Trial(name, (folder / "tiny" / name).resolve())
        say(f"{name}: tiny network")
        trial.write()
        errors[f"{name}, tiny, random"] = measure(trial.family)
    say("the miniature's base")
    base = resolve_path(MINIATURE, "model.path")
    trained = checks.build("sd3", base, height=None, width=None, max_text_length=10)
    errors["miniature's base, trained"] = measure(trained)
    sizes = {name: count(name) for name in known_models()}
    text = as_markdown(errors, sizes)
    (folder / "quantization.json").write_text(json.dumps({"errors": errors, "bytes": sizes}, indent=1) + "\n")
    (folder / "quantization.md").write_text(text, encoding="utf-8")
    say(text)


@torch.no_grad()
def measure(family: ModelFamily) -> Row:
    """By kind, at all states of the whole network's trajectories: the relative error of the velocity, and the KL of a
    step of `flow` between the two networks, per latent dimension and as its mean over the steps.
    """
    whole, (cond, _) = family.load_transformer(), checks.encode(family, checks.PROMPTS)
    sigmas = family.sigmas(STEPS)
    weights, stages = kl_weight(kernel("flow", NOISE_LEVEL).coefficients(sigmas)), family.stages(sigmas)
    drawn = checks.trajectory(family, whole, checks.PROMPTS, checks.noise(family), 1.0, STEPS, torch.float32)
    states = drawn.states
    assert states is not None

    def velocities(network: Any) -> list[torch.Tensor]:
        found = []
        for step in range(STEPS):
            sigma = sigmas[step].float().expand(len(checks.PROMPTS))
            at = family.at_stage(network, stages[step])
            found.append(family.velocity(at, states[:, step].to(family.dtype), sigma, cond))
        return found

    wanted = velocities(whole)
    row: Row = {}
    size = sum(one.float().square().sum() for one in wanted)
    for kind in KINDS:
        found = velocities(family.load_transformer(quantize=kind))
        wrong = sum((mine.float() - one.float()).square().sum() for mine, one in zip(found, wanted, strict=True))
        kl = sum(
            float(weights[step]) * float(velocity_error(found[step], wanted[step]).mean()) for step in range(STEPS)
        )
        row[kind] = {"velocity": float((wrong / size) ** 0.5), "kl": kl / STEPS}
    return row


def count(name: str) -> Row:
    """Bytes of a published network in bf16 and by kind."""
    configs = known_configs(name)
    with torch.device("meta"):
        parts = [
            diffusers_class(configs[part]["_class_name"]).from_config(configs[part])
            for part in PARTS
            if part in configs
        ]
    network = nn.Module.to(parts[0] if len(parts) == 1 else TwoNetworks(*parts), torch.bfloat16)
    whole = sum(parameter.nbytes for parameter in network.parameters())
    return {"bf16": whole, **{kind: whole - saved_bytes(network, kind) for kind in KINDS}}


def as_markdown(errors: dict[str, Row], sizes: dict[str, Row]) -> str:
    """Two tables."""
    wrong = [("", *(f"{kind}: {what}" for kind in KINDS for what in ("velocity", "KL")))]
    for name, row in errors.items():
        cells = (cell for kind in KINDS for cell in (f"{row[kind]['velocity']:.2%}", f"{row[kind]['kl']:.1e}"))
        wrong.append((name, *cells))
    weigh = [("GiB", "bf16", *KINDS)]
    weigh += [(name, *(f"{row[kind] / _GIB:.2f}" for kind in ("bf16", *KINDS))) for name, row in sizes.items()]
    return "\n\n".join(markdown_table(table[0], table[1:]) for table in (wrong, weigh)) + "\n"
