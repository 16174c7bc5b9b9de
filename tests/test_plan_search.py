"""Devices and host memory, the search for a setting, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config
from opd_ds.config.schema import RunConfig
from opd_ds.errors import UserError
from opd_ds.plan.devices import GIB, DeviceKind, Devices, parse_devices, parse_host_memory
from opd_ds.plan.job import job_needs
from opd_ds.plan.planner import AS_FAST, fit, make_plan, settings
from opd_ds.plan.report import cost
from opd_ds.plan.zero import Phase
from opd_ds.runs.setup import Parts
from opd_ds.utils.machine import host_memory
from tests.tiny import costs_of, write_config

Build = Callable[..., tuple[RunConfig, Parts]]


def test_devices_are_read_and_unknown_ones_refused() -> None:
    devices = parse_devices("16xh100-80gb", "--gpus")
    assert (devices.count, devices.per_node, devices.kind.name) == (16, 8, "H100-80GB")
    assert parse_devices("A100-40GB", "--gpus").count == 1
    with pytest.raises(UserError, match=r"--fit = '8xH100'.*allowed.*A100-80GB, H100-80GB.*Did you mean 'H100-80GB'"):
        parse_devices("8xH100", "--fit")
    for count_ in ("0", "12"):
        with pytest.raises(UserError, match="multiples"):
            parse_devices(f"{count_}xH100-80GB", "--gpus")


def small(memory: float) -> Devices:
    """Two devices on which the tiny model is large: links that do not hide, and no allowance."""
    return Devices(DeviceKind("cpu", memory, 1e9, 1e7, 1e7, 1e13), 2)


def test_the_search_finds_the_fastest_that_fits(configured: Callable[..., DistilConfig]) -> None:
    config = configured(rollout__samples=2, rollout__steps=2)
    costs = costs_of(config)
    everything = [make_plan(setting.of(config), costs, small(1)) for setting in settings(config, small(1))]
    needed = sorted(plan.needed for plan in everything)
    for memory in (1e12, needed[len(needed) // 4], needed[0]):
        setting, plan = fit(config, costs, small(memory))
        assert plan.needed <= memory
        assert make_plan(setting.of(config), costs, small(memory)) == plan
        fastest = min(other.seconds.total for other in everything if other.needed <= memory)
        assert plan.seconds.total <= AS_FAST * fastest
    with pytest.raises(UserError, match=r"nothing fits.*most of it \w+") as refused:
        fit(config, costs, small(needed[0] / 4))
    assert "a LoRA student" in str(refused.value)  # the tiny student is trained whole
    lora = configured(rollout__samples=2, rollout__steps=2, student__kind="lora")
    with pytest.raises(UserError, match="nothing fits") as refused:
        fit(lora, costs_of(lora), small(1e5))
    assert "a LoRA student" not in str(refused.value)


def test_of_settings_as_fast_the_search_takes_the_largest_micro_batches(
    configured: Callable[..., DistilConfig],
) -> None:
    config = configured(rollout__samples=4, rollout__steps=2)
    costs, devices = costs_of(config), small(1e12)
    found, plan = fit(config, costs, devices)
    layout = [setting for setting in settings(config, devices) if setting.layout == found.layout]
    seconds = {setting: make_plan(setting.of(config), costs, devices).seconds.total for setting in layout}
    as_fast = [setting for setting in layout if seconds[setting] <= AS_FAST * min(seconds.values())]
    assert len(as_fast) > 1
    assert plan.seconds.total == seconds[found]
    assert found.rollout * found.train == max(setting.rollout * setting.train for setting in as_fast)


def test_evaluation_shrinks_where_it_alone_does_not_fit(configured: Callable[..., DistilConfig]) -> None:
    config = configured(rollout__samples=2, rollout__steps=2, evaluation__micro_batch=64)
    costs, devices = costs_of(config), small(1e12)
    roomy, plan = fit(config, costs, devices)
    assert (roomy.evaluate, roomy.decode) == (64, None)
    parts = {phase: plan.memory.in_phase(phase) for phase in Phase}
    assert plan.memory.worst in (Phase.EVALUATE, Phase.DECODE)
    others = max(size for phase, size in parts.items() if phase not in (Phase.EVALUATE, Phase.DECODE))
    tight, plan = fit(config, costs, small(1.2 * others))
    assert plan.fits
    assert tight.evaluate < 64
    assert f"evaluation.micro_batch={tight.evaluate}" in tight.overrides(config)


def test_images_are_decoded_in_parts_and_the_plan_knows_it(
    configured: Callable[..., DistilConfig], build_run: Build
) -> None:
    whole, parts = (configured(model__decode_micro_batch=count) for count in (None, 1))
    costs = costs_of(whole)
    most, less = (make_plan(one, costs, small(1e12)).memory.in_phase(Phase.DECODE) for one in (whole, parts))
    assert less < most
    _, run = build_run(model__decode_micro_batch=2)
    latents = torch.randn(5, *run.family.latent_shape)
    seen: list[int] = []
    decode = run.family.decode_with
    run.family.decode_with = lambda vae, part: (seen.append(len(part)), decode(vae, part))[1]  # type: ignore[method-assign]
    images = run.family.decode(latents)
    assert seen == [2, 2, 1]
    alone = torch.cat([run.family.decode(latents[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(images, alone)


def test_host_memory_is_held_against_the_nodes(configured: Callable[..., DistilConfig]) -> None:
    """Optimizer states on the host: what a device is spared, the host must have."""
    config = configured(deepspeed="zero3_offload_cpu", rollout__samples=2)
    costs = costs_of(config)
    devices = parse_devices("2xH100-80GB", "--gpus")
    assert devices.host_memory == 2 * 224 * GIB
    plan = make_plan(config, costs, devices)
    assert plan.fits
    less = replace(devices, host=plan.host_needed - 1)
    assert not make_plan(config, costs, less).fits
    with pytest.raises(UserError, match=r"nothing fits.*of a node's host memory \(--host-memory\), most of it process"):
        fit(config, costs, replace(devices, host=1 * GIB))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "much", ""])
def test_host_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--host-memory = .*allowed are GiB of a node.*or `here`"):
        parse_host_memory(text, "--host-memory")


def test_this_machines_host_memory_is_what_its_cgroup_allows(tmp_path: Path) -> None:
    assert parse_host_memory("2", "") == 2 * GIB
    whole = host_memory(())
    assert parse_host_memory("here", "") == host_memory() <= whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert host_memory((tmp_path / "memory.max", tmp_path / "absent")) == 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory((tmp_path / "memory.max",)) == whole


def test_the_command_prints_what_can_be_pasted(configured: Callable[..., DistilConfig], tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", configured().model_dump(mode="json"))
    options = ["plan", "--config", str(file), "--set", "rollout.samples=2"]
    result = CliRunner().invoke(app, [*options, "--gpus", "2xcpu", "--gpu-price", "0.25", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["cost"]["device_hours"] == 2 * found["round"]["run_hours"]
    assert found["cost"]["money"] == 0.25 * found["cost"]["device_hours"]
    device = found["device_bytes"]
    assert sum(device["parts"].values()) == pytest.approx(device["peak"])
    assert device["peak"] == max(device["phases"].values())
    assert found["round"]["passes"]["train"] == {"forward": 32, "backward": 32, "negative": 16}
    assert found["round"]["pass_units"]["per_trajectory"] == 2 * 3 + (1 + 2) / 2 * 4 + 3 * 2 * 4
    assert set(found["compared"]["configured"]) == set(found["compared"]["recommended"])
    written = tmp_path / "best.yaml"
    result = CliRunner().invoke(app, [*options, "--fit", "2xcpu", "--write", str(written)])
    assert result.exit_code == 0, result.output
    assert "0 device hours, without" in result.output  # nobody says what they cost
    pasted = [line.strip().removesuffix("\\").split()[1] for line in result.output.splitlines() if "--set " in line]
    assert load_config(None, written, []) == load_config(None, file, ["rollout.samples=2", *pasted])
    with pytest.raises(UserError, match="nothing is overwritten"):
        CliRunner().invoke(app, [*options, "--fit", "2xcpu", "--write", str(written)], catch_exceptions=False)


def test_a_job_asks_for_what_the_plan_says(configured: Callable[..., DistilConfig]) -> None:
    config = configured(deepspeed="zero3_offload_cpu")
    planned = make_plan(config, costs_of(config), parse_devices("2xH100-80GB", "--gpu"))
    assert cost(planned)["assumed"]
    assert cost(planned)["money"] == planned.devices.kind.price * cost(planned)["device_hours"]
    needs = job_needs(config, "H100-80GB", 1, 2)
    assert needs.memory == math.ceil(1.25 * planned.host_needed / GIB)
    assert needs.saving == pytest.approx(2 * planned.seconds.total, rel=0.05)
