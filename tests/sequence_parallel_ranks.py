"""Run on two ranks by `test_sequence_parallel.py`: each family's network with its sequences whole, and shared."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world
from opd_ds.engine import Group, init_group
from opd_ds.models import ModelFamily
from opd_ds.testing import family_checks as checks
from opd_ds.utils.logging import quiet_libraries

VIDEO = {"height": 32, "width": 32, "frames": 5}
FAMILIES_THAT_SHARE = {"flux": {}, "wan": VIDEO, "wan_a14b": VIDEO, "wan_i2v": VIDEO | {"max_text_length": None}}


def main(folder: Path) -> None:
    """Writes the largest relative differences by family."""
    world = detect_world()
    prepare_environment(world)
    quiet_libraries()
    found = {}
    with init_group(world) as group:
        group.share_sequences(2)
        for name, size in FAMILIES_THAT_SHARE.items():
            if world.is_main:
                checks.tiny_module(name).write(folder / name)
            group.barrier()
            family = checks.build(name, folder / name, **size)
            family.sequence_mesh = group.sequence_mesh
            family.check_sequences(2)
            found[name] = differences(family, group)
    if world.is_main:
        (folder / "differences.json").write_text(json.dumps(found))


def differences(family: ModelFamily, group: Group) -> dict[str, float]:
    """Between a network and a copy of one that shares its sequences."""
    whole = family.load_transformer().requires_grad_(True)
    original = copy.deepcopy(whole)
    family.share_sequences(original)
    shared = copy.deepcopy(original)  # as the replica for rollouts is made; it must not call what it is copied from
    for parameter in original.parameters():
        parameter.data.zero_()
    ours, theirs = (passed(family, network) for network in (shared, whole))
    sums = {name: group.sum(gradient) for name, gradient in ours[1].items()}
    gradients = {name: apart(sums[name], gradient) for name, gradient in theirs[1].items()}
    return {"velocity": apart(ours[0], theirs[0]), "gradient": max(gradients.values())}


def passed(family: ModelFamily, network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """A velocity, and the gradients of a loss of it; of two networks of the first."""
    cond, _ = checks.encode(family, checks.PROMPTS)
    x, sigma = checks.noise(family).draw(slice(None)), torch.tensor([0.95, 0.9, 0.93, 0.99])
    velocity = family.velocity(family.at_stage(network, 0), x, sigma, cond)
    (velocity - x).square().mean().backward()
    named = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    return velocity.detach(), named


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
