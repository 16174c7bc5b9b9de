"""Run on two ranks by `test_sharded_loading.py`: what each owns after loading, and what they gather and compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from opd_ds.cluster.rendezvous import prepare_environment
from opd_ds.cluster.world import detect_world
from opd_ds.config.sections import StudentSection
from opd_ds.config.teachers import TeacherSection
from opd_ds.engine import Group, ShardedParameters, frozen_ds_config, init_group
from opd_ds.models import FAMILIES, ModelFamily, build_family, lora
from opd_ds.testing.family_checks import tiny_module
from opd_ds.training.networks import student_module
from opd_ds.training.teachers import TeacherPool, TeacherSpec
from opd_ds.utils.logging import quiet_libraries

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offloaded": {"offload_param": {"device": "cpu"}},
    "hpZ": {"zero_hpz_partition_size": 2},
}


def main(folder: Path) -> None:
    world = detect_world()
    prepare_environment(world)
    quiet_libraries()
    with init_group(world) as group:
        done = []
        for name in FAMILIES:
            path = folder / name
            if world.is_main:
                tiny_module(name).write(path)
            group.gather(None)
            family = build_family(name, path, dtype=torch.bfloat16, device=group.device, height=32, width=32)
            for way in WAYS if name == "sd3" else ("plain",):
                check_parts(family, group, config(group, way), way)
            check_lora_student(family, config(group, "plain"))
            if name in ("sd3", "wan"):  # Wan has layers that diffusers keeps in float32
                check_teacher(family, group, config(group, "plain"))
            done.append(name)
        if world.is_main:
            (folder / "done.json").write_text(json.dumps(done))


def config(group: Group, way: str) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **WAYS[way]}
    return frozen_ds_config({"zero_optimization": zero}, "bf16", group.world.size, "here")


def check_parts(family: ModelFamily, group: Group, ds_config: dict[str, Any], way: str) -> None:
    """No rank holds more than its part, and together they have the network."""
    whole = family.load_transformer()
    sharded = family.load_transformer(build=ShardedParameters(ds_config))
    for parameter in sharded.parameters():
        assert parameter.numel() == 0
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // group.world.size)
        assert (parameter.ds_secondary_tensor is not None) == (way == "hpZ")
    equal(sharded, whole)
    for (name, buffer), (_, theirs) in zip(sharded.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(buffer, theirs), name


def check_lora_student(family: ModelFamily, ds_config: dict[str, Any]) -> None:
    """The same adapter over a sharded base as over a whole one."""
    settings = StudentSection(kind="lora")
    whole, sharded = (
        student_module(settings, 3, family, None, build) for build in (None, ShardedParameters(ds_config))
    )
    equal(sharded, whole)
    trained = {name for name, parameter in sharded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert trained


@torch.no_grad()
def check_teacher(family: ModelFamily, group: Group, ds_config: dict[str, Any]) -> None:
    """Full and as an adapter, under ZeRO-Inference, it answers as the network would by itself."""
    latents, sigma, cond = torch.randn(2, *family.latent_shape), torch.full((2,), 0.5), family.encode(["a", "b"])
    settings = TeacherSection(path=str(family.path), placement="zero_inference")
    pool = TeacherPool(family, {"full": TeacherSpec(settings, family.path, ds_config)}, group.device)
    wanted = family.velocity(family.load_transformer(), latents, sigma, cond)
    with pool.active("full") as teacher:
        assert torch.equal(family.velocity(teacher, latents, sigma, cond), wanted)


def equal(sharded: nn.Module, whole: nn.Module) -> None:
    theirs = dict(whole.named_parameters())
    assert dict(sharded.named_parameters()).keys() == theirs.keys()
    for name, parameter in sharded.named_parameters():
        if lora.ADAPTER_KEY.match(name):  # made beside the base, sharded by `deepspeed.initialize`
            assert torch.equal(parameter, theirs[name]), name
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, theirs[name]), name
            assert parameter.dtype == theirs[name].dtype


if __name__ == "__main__":
    from opd_ds.cluster.failures import report_and_exit

    try:
        main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
    except BaseException as error:
        report_and_exit(error)
