"""Bad input is one clear line, before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.config.paths import package_root, resolve_ds_config, resolve_path
from opd_ds.engine import (
    NetworkSizes,
    fill_sizes,
    frozen_ds_config,
    parameter_builder,
    read_ds_config,
    student_ds_config,
    swapped_apart,
)
from opd_ds.errors import UserError
from tests.tiny import run_settings, write_config


@pytest.fixture
def config_file(tiny_world: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", run_settings(tiny_world, tmp_path / "out"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.stepps=20", r"^rollout\.stepps = 20: unknown key; allowed here: .*steps.* Did you mean 'steps'\?$"),
        ("tasks.one.teachr=x", r"^tasks\.one\.teachr = 'x': unknown key; .* Did you mean 'teacher'\?$"),
        ("student.ema.decy=0.5", r"^student\.ema\.decy = 0\.5: unknown key; .* Did you mean 'decay'\?$"),
        ("rolout.steps=20", r"^rolout: unknown key; allowed here: .* Did you mean 'rollout'\?$"),
        ("rollout.steps=0", r"^rollout\.steps = 0: .*greater than 0"),
        ("rollout.steps=many", r"^rollout\.steps = 'many': .*integer"),
        ("rollout.kernel=eular", r"^rollout\.kernel = 'eular': .*\. Did you mean 'euler'\?$"),
        ("tasks.one.teacher.placement=residnt", r"^tasks\.one\.teacher\.placement = .*Did you mean 'resident'\?$"),
        ("objective={method: closd_form}", r"^objective\.method = 'closd_form': .* Did you mean 'closed_form'\?$"),
        ("scoring.micro_batch=atuo", r"^scoring\.micro_batch = 'atuo': .*integer.* or .* Did you mean 'auto'\?$"),
        ("teech={algorithm: nft}", r"^teech: unknown key; .* Did you mean 'teach'\?$"),
        ("optimizer.betas=[1]", r"^optimizer\.betas: has 1 entries and needs more$"),
        ("student.lora.targets=3", r"^student\.lora\.targets = 3: .*valid list"),
        ("tasks.three=null", r"^tasks\.three = null: .* there is nothing$"),
        ("rollout.kernel=heun", r"^rollout\.kernel = 'heun': .*'euler'.*'dpm2'"),
        ("precision=fp8", r"^precision = 'fp8': .*'fp32'.*'bf16'"),
        ("rollout.noise_level=0.7", r"^rollout: noise_level = 0\.7 contradicts kernel = 'euler'.*flow"),
        ("rollout.trained_steps.steps=[9]", r"give exactly one of fraction, steps, queries|must name steps 0 to 3"),
        ("rollout.trained_steps={queries: 2, steps: [1]}", r"here are steps and queries: null takes one away$"),
        ("rollout.trained_steps={queries: 9}", r"trained_steps\.queries = 9: a trajectory has only 4 steps"),
        ("rollout.trained_steps={steps: [9]}", r"must name steps 0 to 3"),
        ("rollout.trained_steps={fraction: 0.01}", r"leaves no step"),
        ("objective.target=velocity", r"^objective: weighting = 'kl' belongs to target = 'transition'"),
        ("tasks={}", r"^tasks"),
        ("tasks.a b={teacher: x, prompts: y}", r"'a b' may hold letters, digits"),
        ("tasks.one.reward=ocr", r"^tasks\.one\.reward = 'ocr': unknown key; .* Did you mean 'rewards'\?$"),
        ("tasks.one.rewards=[{name: ocr, labl: x}]", r"^tasks\.one\.rewards\.0\.labl = 'x': unknown key; .*'label'\?$"),
        ("tasks.one.rewards=[ocr, ocr]", r"tasks\.one\.rewards: the label 'ocr' stands for two rewards"),
        ("tasks.one.rewards=[{name: ocr, label: a/b}]", r"the label 'a/b' may hold letters"),
    ],
)
def test_one_line_per_problem(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, config_file, [override])
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named(tmp_path: Path, tiny_world: Path) -> None:
    data = run_settings(tiny_world, tmp_path)
    del data["run"]["rounds"]
    with pytest.raises(UserError, match=r"^run\.rounds: required and missing"):
        load_config(None, write_config(tmp_path / "c.yaml", data), [])


@pytest.mark.parametrize("key", ["tasks.two.teacher", "anchor"])
def test_batches_that_ranks_find_for_themselves_need_forwards_without_collectives(tmp_path: Path, key: str) -> None:
    """Ranks that shrink differently would wait for one another."""
    sharded = {"path": "x", "placement": "zero_inference"}
    changes: dict[str, Any] = {"scoring__micro_batch": "auto", key.replace(".", "__"): sharded}
    with pytest.raises(ValidationError, match=rf"micro_batch = 'auto'.*{key}\.placement = 'zero_inference'"):
        DistilConfig.model_validate(run_settings(tmp_path, tmp_path / "out", **changes))


@pytest.mark.parametrize("placement", ["offload", "zero_inference"])
def test_fused_mode_refuses_streamed_teachers(config_file: Path, placement: str) -> None:
    overrides = ["rollout.mode=fused", f"tasks.two.teacher.placement={placement}"]
    with pytest.raises(UserError, match=rf"tasks\.two\.teacher\.placement = '{placement}'"):
        load_config(None, config_file, overrides)
    with pytest.raises(UserError, match=r"train\.inner_epochs = 2"):
        load_config(None, config_file, ["rollout.mode=fused", "train.inner_epochs=2"])


def test_two_tasks_with_one_name(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tasks:\n  ocr: {teacher: a, prompts: b}\n  ocr: {teacher: c, prompts: d}\n")
    with pytest.raises(UserError, match=r"line 3: key 'ocr' appears twice"):
        load_config(None, file, [])


def test_overrides(config_file: Path) -> None:
    overrides = ["rollout.steps=20", "optimizer.lr=1e-4", "tasks.one.teacher=/elsewhere", "optimizer.betas=[0.8, 0.9]"]
    config = load_config(None, config_file, overrides)
    assert config.rollout.steps == 20
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.tasks["one"].teacher.path, config.tasks["one"].teacher.guidance) == ("/elsewhere", 1.0)
    for bad in ("rollout.steps", "=3", "run.rounds.x=3"):
        with pytest.raises(UserError, match="--set"):
            load_config(None, config_file, [bad])


def test_a_recipe_or_a_file_is_needed() -> None:
    with pytest.raises(UserError, match=r"give --recipe NAME, --config FILE, or both"):
        load_config(None, None, [])
    with pytest.raises(UserError, match=r"'miniatur': unknown.*Did you mean 'miniature'"):
        load_config("miniatur", None, [])


@pytest.mark.parametrize(
    "name", ["miniature", "mopd_sd35m", "sopd_sd35m_ocr", "sopd_sd35m_geneval", "sopd_sd35m_aesthetic"]
)
def test_shipped_recipes_are_valid(name: str) -> None:
    assert name in recipe_names()
    config = load_config(name, None, [])
    path = resolve_ds_config(config.deepspeed, "deepspeed")
    student_ds_config(read_ds_config(path), config, World(0, 0, 2, 2), str(path))


def test_paper_settings_of_the_multi_teacher_recipe() -> None:
    config = load_config("mopd_sd35m", None, [])
    assert (config.student.kind, config.student.lora.rank, config.student.lora.alpha) == ("lora", 32, 64)
    assert (config.rollout.steps, config.rollout.kernel, config.rollout.noise_level) == (10, "euler", 0.0)
    assert int(config.rollout.steps * (config.rollout.trained_steps.fraction or 0)) == 9
    assert config.rollout.guidance == 4.5
    guidance = {name: task.teacher.guidance for name, task in config.tasks.items()}
    assert guidance == {"geneval": 1.0, "ocr": 4.5, "aesthetic": 4.5}
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (3e-4, 1e-4)
    assert (config.student.ema.decay, config.student.ema.every) == (0.9, 8)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks\.a\.teacher = './nothing': no such file"):
        resolve_path("./nothing", "tasks.a.teacher")
    with pytest.raises(UserError, match="carries no such file"):
        resolve_path("package:nothing", "model.path")
    assert resolve_path(str(tmp_path), "x") == tmp_path.resolve()
    with pytest.raises(UserError, match=r"deepspeed = 'zero9'.*shipped are .*zero3"):
        resolve_ds_config("zero9", "deepspeed")
    assert resolve_ds_config("ds_configs/zero3.json", "deepspeed").is_file()


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path = 'nobody/nothing-here': .*give a local folder"):
        resolve_path("nobody/nothing-here", "model.path")


# ---- ds_config ----


def completed(config_file: Path, template: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return student_ds_config(template, load_config(None, config_file, list(overrides)), World(0, 0, 4, 2), "mine.json")


def test_every_shipped_ds_config_completes(config_file: Path) -> None:
    config = load_config(None, config_file, [])
    files = sorted((package_root() / "ds_configs").glob("*.json"))
    assert len(files) >= 9
    for file in files:
        template = read_ds_config(file)
        if file.stem.startswith("zero_inference"):
            ds_config = frozen_ds_config(template, "bf16", 4, file.name)
            assert "optimizer" not in ds_config
        else:
            ds_config = student_ds_config(template, config, World(0, 0, 4, 2), file.name)
            assert ds_config["optimizer"]["params"]["lr"] == 1e-3
        batch = ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"] * 4
        assert ds_config["train_batch_size"] == batch
        assert '"auto"' not in json.dumps(fill_sizes(ds_config, NetworkSizes(1000, 500, 100, 100)))


@pytest.mark.parametrize(
    ("template", "overrides", "message"),
    [
        ({"train_batch_size": 64}, [], r"train_batch_size = 64 is not taken from there.*rollout\.samples"),
        ({"gradient_accumulation_steps": 2}, [], r"gradient_accumulation_steps = 2"),
        ({"bf16": {"enabled": True}}, [], r"bf16\.enabled = True contradicts precision = 'fp32'"),
        ({"torch_autocast": {"enabled": True}}, [], "torch_autocast is not supported"),
        ({"gradient_clipping": 5.0}, ["optimizer.max_grad_norm=1.0"], r"gradient_clipping = 5.0 .* = 1.0 differ"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, ["optimizer.lr=2.0"], r"optimizer\.params\.lr = 1"),
        ({"scheduler": {"type": "WarmupLR"}}, ["optimizer.warmup_rounds=3"], "has a scheduler"),
    ],
)
def test_ds_config_conflicts_are_errors(
    config_file: Path, template: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        completed(config_file, template, *overrides)


def test_explicit_ds_config_values_stand(config_file: Path) -> None:
    explicit = completed(config_file, {"gradient_clipping": 5.0, "optimizer": {"type": "Lion", "params": {"lr": 1e-3}}})
    assert explicit["gradient_clipping"] == 5.0
    assert explicit["optimizer"] == {"type": "Lion", "params": {"lr": 1e-3}}


def test_schedules(config_file: Path) -> None:
    warm = completed(config_file, {}, "optimizer.warmup_rounds=5")["scheduler"]
    assert (warm["type"], warm["params"]["warmup_num_steps"]) == ("WarmupLR", 5)
    cosine = completed(config_file, {}, "optimizer.schedule=cosine", "train.inner_epochs=2")["scheduler"]
    assert (cosine["type"], cosine["params"]["total_num_steps"]) == ("WarmupCosineLR", 6)
    assert "scheduler" not in completed(config_file, {})


def test_teacher_ds_config_refusals() -> None:
    with pytest.raises(UserError, match="a teacher engine needs 3"):
        frozen_ds_config({"zero_optimization": {"stage": 2}}, "fp32", 1, "mine.json")
    with pytest.raises(UserError, match="a teacher never trains; remove 'optimizer'"):
        frozen_ds_config({"zero_optimization": {"stage": 3}, "optimizer": {}}, "fp32", 1, "mine.json")


def test_config_is_plain_data(config_file: Path) -> None:
    """What `config.yaml` in the output folder holds is a config again."""
    config = load_config(None, config_file, [])
    assert DistilConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_reward_is_a_name_or_a_mapping(config_file: Path) -> None:
    entries = "[ocr, {name: remote, label: judge, options: {url: http://localhost:1}}]"
    config = load_config(None, config_file, [f"tasks.one.rewards={entries}", "tasks.two.rewards=[ocr]"])
    assert [(reward.name, reward.label, reward.options) for reward in config.tasks["one"].rewards] == [
        ("ocr", "ocr", {}),
        ("remote", "judge", {"url": "http://localhost:1"}),
    ]
    assert [task.headline for task in config.tasks.values()] == ["ocr", "ocr"]
    assert list(config.rewards) == ["ocr", "judge"]
    with pytest.raises(UserError, match="the label 'ocr' stands for two rewards"):
        load_config(None, config_file, ["tasks.one.rewards=[ocr]", "tasks.two.rewards=[{name: ocr, options: {n: 1}}]"])


@pytest.mark.parametrize(
    ("world", "given", "filled"),
    [
        (World(0, 0, 16, 8), "auto", 8),
        (World(0, 0, 8, 8), "auto", 1),  # one node: plain ZeRO-3
        (World(0, 0, 4, 1), "auto", 1),
        (World(0, 0, 16, 8), 4, 4),
    ],
)
def test_hierarchical_sharding_follows_the_nodes(config_file: Path, world: World, given: Any, filled: int) -> None:
    template = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": given}}
    ds_config = student_ds_config(template, load_config(None, config_file, []), world, "mine.json")
    assert ds_config["zero_optimization"]["zero_hpz_partition_size"] == filled


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2, "zero_hpz_partition_size": "auto"}, r"zero_hpz_partition_size = 2 needs stage 3, not 2"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, r"zero_hpz_partition_size = 3 does not divide the 4 ranks"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients is not supported"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio other than 1 is not supported"),
        ({"stage": 3, "mics_shard_size": 2}, r"mics_shard_size: DeepSpeed has removed MiCS; use zero_hpz_partition"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(config_file: Path, zero: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        completed(config_file, {"zero_optimization": zero})


def test_auto_sizes_follow_the_network_and_numbers_stand() -> None:
    shipped = {path.stem: read_ds_config(path) for path in sorted((package_root() / "ds_configs").glob("*.json"))}
    small = NetworkSizes(parameters=16_000_000, trained=8_000_000, largest=300_000, largest_trained=200_000)
    large = NetworkSizes(12 * 10**9, 12 * 10**9, 50_000_000, 50_000_000)
    sizes = fill_sizes(shipped["zero3"], small)["zero_optimization"]
    assert (sizes["reduce_bucket_size"], sizes["stage3_prefetch_bucket_size"]) == (1_000_000, 2_000_000)
    assert sizes["stage3_max_live_parameters"] == sizes["stage3_max_reuse_distance"] == 4_000_000
    sizes = fill_sizes(shipped["zero3"], large)["zero_optimization"]
    assert (sizes["reduce_bucket_size"], sizes["stage3_max_live_parameters"]) == (50_000_000, 10**9)
    adapters = NetworkSizes(parameters=10**9, trained=80_000, largest=10**7, largest_trained=50_000)
    assert fill_sizes(shipped["zero2"], adapters)["zero_optimization"]["reduce_bucket_size"] == 50_000
    swapped = fill_sizes(shipped["zero3_offload_nvme"], adapters)["zero_optimization"]["offload_param"]
    assert swapped["buffer_size"] == 10**7
    own = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}
    assert fill_sizes(own, large) == own


def test_engines_that_swap_to_nvme_have_folders_of_their_own() -> None:
    """DeepSpeed empties an engine's folder when it is made."""
    shipped = read_ds_config(package_root() / "ds_configs" / "zero3_offload_nvme.json")
    folders = set()
    for name in ("student", "tasks.one.teacher"):
        zero = swapped_apart(shipped, name)["zero_optimization"]
        assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"]
        folders.add(zero["offload_param"]["nvme_path"])
    assert folders == {"/tmp/opd_ds_nvme/student", "/tmp/opd_ds_nvme/tasks.one.teacher"}
    plain = read_ds_config(package_root() / "ds_configs" / "zero3.json")
    assert swapped_apart(plain, "student") == plain


def test_parameters_are_sharded_with_the_networks_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes the buffers of what swaps to NVMe when parameters are sharded, and drops an "auto" there."""
    monkeypatch.setattr("opd_ds.engine.sharded_loading.ShardedParameters", lambda ds_config: ds_config)
    shipped = read_ds_config(package_root() / "ds_configs" / "zero3_offload_nvme.json")
    with torch.device("meta"):
        network = torch.nn.Linear(30, 20)
    built: Any = parameter_builder(shipped, torch.device("cpu"), lambda: network)
    assert built["zero_optimization"]["offload_param"]["buffer_size"] == 600
