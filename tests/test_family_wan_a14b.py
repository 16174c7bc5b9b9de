"""Wan with two networks against diffusers' own pipeline, and rounds in which each is trained where it is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.sections import StudentSection
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.merge.files import parse_sources
from opd_ds.merge.merging import Method, merge
from opd_ds.models import build_family, lora
from opd_ds.models.wan_a14b import WanA14B
from opd_ds.runs.preflight import preflight
from opd_ds.runs.setup import prepare
from opd_ds.testing import family_checks as checks
from opd_ds.testing.tiny import wan, wan_a14b
from opd_ds.training.networks import lora_targets
from opd_ds.training.stages import in_stages, stage_counts
from opd_ds.training.steps import choose_steps
from tests.ranks import launch
from tests.runs import assert_close, metrics
from tests.tiny import with_changes, write_config

SIZE: dict[str, Any] = {"height": 16, "width": 32, "frames": 5, "max_text_length": 10}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, teacher/ and prompts.txt."""
    folder = tmp_path_factory.mktemp("a14b")
    wan_a14b.write(folder / "base")
    wan_a14b.write(folder / "teacher", seed=5)
    (folder / "prompts.txt").write_text("\n".join(checks.PROMPTS) + "\n")
    return folder


def family(folder: Path, low_noise_guidance: float | None = None, **settings: Any) -> WanA14B:
    size = {"height": 32, "width": 48, "frames": 9, "max_text_length": 20, "text_encoders": "resident"} | settings
    found = build_family("wan_a14b", folder, dtype=torch.float32, device=checks.CPU, **size)
    found.low_noise_guidance = low_noise_guidance
    assert isinstance(found, WanA14B)
    return found


def settings(world: Path, folder: Path, stage: int = 3, **changes: Any) -> dict[str, Any]:
    zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    folder.mkdir(parents=True, exist_ok=True)
    ds_config = folder / "ds.json"
    optimizer = {"type": "SGD", "params": {"lr": "auto"}}
    engine = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "optimizer": optimizer}
    ds_config.write_text(json.dumps(engine))
    data = {
        "run": {"rounds": 1, "output_dir": str(folder / "out"), "seed": 3},
        "model": {"family": "wan_a14b", "path": str(world / "base"), **SIZE},
        "precision": "fp32",
        "deepspeed": str(ds_config),
        "student": {"lora": {"rank": 2, "alpha": 4}, "ema": {"decay": 0}},
        "optimizer": {"lr": 1.0, "max_grad_norm": 0.0},
        "rollout": {"samples": 2, "steps": 4, "guidance": 1.0, "trained_steps": {"queries": 1}},
        "train": {"micro_batch": 4},
        "tasks": {"it": {"teacher": str(world / "teacher"), "prompts": str(world / "prompts.txt")}},
        "evaluation": {"baselines": False},
    }
    return with_changes(data, changes)


def moved(world: Path, folder: Path, group: Group, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient of one round: what a step of SGD takes away from the trained weights."""
    parts = prepare(DistilConfig.model_validate(settings(world, folder, **changes)), group)
    before = parts.student.gather_weights(trainable_only=True)
    parts.trainer.run_round(0)
    after = parts.student.gather_weights(trainable_only=True)
    return {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize(("guidance", "low"), [(1.0, None), (3.5, None), (3.5, 2.0)])
def test_euler_draws_the_latents_of_diffusers(world: Path, guidance: float, low: float | None) -> None:
    ours = family(world / "base", low)
    assert ours.stages(ours.sigmas(4)[:-1]) == (0, 0, 1, 1)
    final = checks.roll_out(ours, ours.load_transformer(), guidance)
    checks.close(final, checks.draw(wan_a14b, ours, checks.load_pipeline(ours, ours.path), guidance))
    if low is not None:
        plain = family(world / "base")
        assert (final - checks.roll_out(plain, plain.load_transformer(), guidance)).abs().max() > 1e-2


def test_exports_draw_the_same_in_diffusers(world: Path, tmp_path: Path) -> None:
    checks.check_exports(wan_a14b, family(world / "base"), world / "teacher", tmp_path, 3.5)
    assert sorted(folder.name for folder in (tmp_path / "lora").iterdir()) == ["transformer", "transformer_2"]


def test_pairs_go_network_by_network_and_short_parts_are_filled_up() -> None:
    chosen, stages = torch.tensor([[0, 3], [1, 2], [0, 1]]), (0, 0, 1, 1)
    assert stage_counts([chosen, chosen.flip(0)], stages) == (4, 2)
    assert stage_counts([chosen[:1], chosen[2:]], stages) == (2, 1)
    first, second = in_stages(chosen.flatten(), stages, (4, 3))
    assert (first.index.tolist(), first.step.tolist()) == ([0, 2, 4, 5], [0, 1, 0, 1])
    assert (second.index.tolist(), second.step.tolist()) == ([1, 3, 0], [3, 2, 2])
    assert (first.counts.tolist(), second.counts.tolist()) == ([True] * 4, [True, True, False])
    none = in_stages(torch.tensor([0, 1]), stages, (2, 1))[1]
    assert (none.index.tolist(), none.step.tolist(), none.counts.tolist()) == ([0], [2], [False])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_network_learns_where_it_is_asked(world: Path, tmp_path: Path, group: Group, stage: int) -> None:
    """However it is cut: the last micro-batch is of one network, and the other's gradient is there all the same."""
    fixed = {"rollout__trained_steps": {"fraction": 1.0}, "stage": stage}
    whole = moved(world, tmp_path / "whole", group, **fixed)
    cut = moved(world, tmp_path / "cut", group, train__micro_batch=1, **fixed)
    assert {name.split(".")[0] for name in whole} == {"transformer", "transformer_2"}
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)
    alone = {"high_noise": [0, 1], "low_noise": [2, 3]}
    high, low = (
        moved(
            world, tmp_path / name, group, stage=stage, student__networks=name, rollout__trained_steps={"steps": steps}
        )
        for name, steps in alone.items()
    )
    assert high.keys() | low.keys() == whole.keys()
    assert not high.keys() & low.keys()
    for name, gradient in (high | low).items():  # a mean over half as many steps
        torch.testing.assert_close(gradient, 2 * whole[name], rtol=1e-4, atol=1e-6)
    moving = {name.split(".")[0] for name, gradient in whole.items() if gradient.abs().max() > 1e-6}
    assert moving == {"transformer", "transformer_2"}


def test_fused_and_buffered_rounds_are_the_same(world: Path, tmp_path: Path, group: Group) -> None:
    buffered, fused = (moved(world, tmp_path / mode, group, rollout__mode=mode) for mode in ("buffered", "fused"))
    for name, gradient in buffered.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-6)


def test_several_updates_of_a_round_do_not_depend_on_how_it_is_cut(world: Path, tmp_path: Path, group: Group) -> None:
    changes: dict[str, Any] = {"train__updates_per_round": 2, "rollout__samples": 4, "optimizer__lr": 0.1}
    whole, cut = (moved(world, tmp_path / str(size), group, train__micro_batch=size, **changes) for size in (4, 1))
    for name, change in whole.items():
        torch.testing.assert_close(cut[name], change, rtol=1e-4, atol=1e-6)
    assert max(change.abs().max() for change in whole.values()) > 0


def write_lora(ours: WanA14B, folder: Path, networks: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    network = ours.load_transformer()
    student = StudentSection(kind="lora", networks=networks)
    lora.new_adapter(network, "student", LoraConfig(r=2, lora_alpha=4, target_modules=lora_targets(student, ours)))
    torch.manual_seed(seed)
    state = {key: torch.randn_like(value) * 0.3 for key, value in lora.adapter_parameters(network, "student").items()}
    ours.save_lora(state, lora.adapter_config(network, "student"), folder)
    return state


def test_networks_are_merged_with_their_like(world: Path, tmp_path: Path) -> None:
    """LoRAs, of which one is for one network only; and a LoRA with a full checkpoint."""
    ours = family(world / "base")
    write_lora(ours, tmp_path / "both", "both")
    write_lora(ours, tmp_path / "low", "low_noise", seed=2)
    base = ours.load_transformer().state_dict()

    def delta(source: Path) -> dict[str, torch.Tensor]:
        if lora.is_adapter(source):
            found = ours.load_transformer(adapter=source).state_dict()
        else:
            found = ours.load_transformer(source).state_dict()
        return {key: found[key] - base[key] for key in base}

    both, low, teacher = (delta(folder) for folder in (tmp_path / "both", tmp_path / "low", world / "teacher"))
    sources = [f"{tmp_path / 'both'}:2", f"{tmp_path / 'low'}:-1"]
    merge(tmp_path / "lora", parse_sources(sources), Method(), family="wan_a14b")
    found = delta(tmp_path / "lora")
    for key in base:
        torch.testing.assert_close(found[key], 2 * both[key] - low[key], rtol=0, atol=1e-5)
    sources = [str(tmp_path / "both"), f"{world / 'teacher'}:0.25"]
    merge(tmp_path / "full", parse_sources(sources), Method(), base=str(world / "base"), family="wan_a14b")
    found = delta(tmp_path / "full")
    for key in base:
        torch.testing.assert_close(found[key], both[key] / 2 + teacher[key] / 4, rtol=0, atol=1e-5)
    for sources, name, said in [
        ([tmp_path / "low"] * 2, "wan", "a LoRA of two networks, and --family has one"),
        ([tmp_path / "low" / "transformer_2"] * 2, "wan_a14b", "a LoRA of one network, and --family has two"),
    ]:
        with pytest.raises(UserError, match=said):
            merge(tmp_path / "none", parse_sources(list(map(str, sources))), Method(), family=name)


@pytest.mark.parametrize("networks", ["both", "low_noise"])
def test_a_lora_of_both_networks_or_of_one(world: Path, tmp_path: Path, group: Group, networks: Any) -> None:
    both = ["transformer", "transformer_2"]
    wanted, steps = {"both": (both, [0, 1, 2, 3]), "low_noise": (both[1:], [2, 3])}[networks]
    changes = {"student__kind": "lora", "student__networks": networks, "rollout__trained_steps": {"steps": steps}}
    gradient = moved(world, tmp_path / "run", group, **changes)
    assert sorted({name.split(".")[0] for name in gradient}) == wanted
    for part in wanted:
        assert max(value.abs().max() for name, value in gradient.items() if name.startswith(f"{part}.")) > 0
    ours = family(world / "base")
    state = write_lora(ours, tmp_path / "lora", networks)
    assert sorted(folder.name for folder in (tmp_path / "lora").iterdir()) == wanted
    read = lora.read_adapter(tmp_path / "lora", ours.pipeline_class)[1]
    assert read.keys() == state.keys()
    # As a teacher beside the student's own, and merged into a full one's start.
    taught = settings(world, tmp_path / "taught", tasks__it__teacher=str(tmp_path / "lora"), **changes)
    assert prepare(DistilConfig.model_validate(taught), group).trainer.run_round(0).losses.loss > 0
    merged = ours.load_transformer(adapter=tmp_path / "lora").state_dict()
    plain = ours.load_transformer().state_dict()
    assert {key.split(".")[0] for key in plain if not torch.equal(plain[key], merged[key])} == set(wanted)


@pytest.mark.multirank
def test_ranks_whose_pairs_fall_on_different_networks_stay_in_step(world: Path, tmp_path: Path, group: Group) -> None:
    """Under ZeRO-3 the forwards are collective: each rank has one pair, one of the first network, one of the second."""

    def drawn(seed: int) -> list[int]:
        setting = DistilConfig.model_validate(settings(world, tmp_path / "x")).rollout.trained_steps
        return choose_steps(setting, 4, seed, 0, "it", [0, 1]).flatten().tolist()

    seed = next(seed for seed in range(100) if sorted(step // 2 for step in drawn(seed)) == [0, 1])
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        file = write_config(folder.with_suffix(".yaml"), settings(world, folder, run__seed=seed))
        launch(ranks, "--config", str(file))
    one, two = (tmp_path / str(ranks) / "out" for ranks in (1, 2))
    assert_close(metrics(two), metrics(one))
    for part in ("transformer", "transformer_2"):
        files = [folder / "export" / part / "diffusion_pytorch_model.safetensors" for folder in (one, two)]
        ours, theirs = map(load_file, files)
        before = load_file(world / "base" / part / files[0].name)
        assert any((ours[key] - before[key]).abs().max() > 1e-6 for key in ours)
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-6)


def test_refusals(world: Path, tmp_path: Path, group: Group) -> None:
    one = wan.write(tmp_path / "one")
    with pytest.raises(UserError, match=r"boundary_ratio = None.* set model.family = 'wan'"):
        family(one)
    with pytest.raises(UserError, match=r"boundary_ratio = 0.8.* set model.family = 'wan_a14b'"):
        build_family("wan", world / "base", dtype=torch.float32, device=checks.CPU)
    ours = family(world / "base")
    with pytest.raises(UserError, match="no transformer_2/; expected"):
        ours.check_compatible(one)
    other = shutil.copytree(world / "teacher", tmp_path / "other")
    checks.change(other / "model_index.json", boundary_ratio=0.9)
    with pytest.raises(UserError, match=r"boundary_ratio = 0\.9, the student has 0\.8"):
        ours.check_compatible(other)

    def refused(message: str, **changes: Any) -> None:
        config = DistilConfig.model_validate(settings(world, tmp_path / "run", **changes))
        with pytest.raises(UserError, match=message):
            preflight(config, group, group.world, None)

    high = {"rollout__trained_steps": {"steps": [0, 1]}}
    refused(r"student.networks = 'both': no trained step asks transformer_2; .* above sigma 0\.8 ask the first", **high)
    refused(r"steps ask the other network, too; .*steps to some of \[2, 3\]", student__networks="low_noise")
    single = {"model__family": "wan", "model__path": str(one), "tasks__it__teacher": str(one)}
    refused(r"student\.networks = 'low_noise': the model has one network", student__networks="low_noise", **single)
    refused(r"model.low_noise_guidance = 3: .* has one network", model__low_noise_guidance=3.0, **single)
