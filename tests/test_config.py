"""Bad input is one clear line, before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config
from opd_ds.config.paths import resolve_ds_config, resolve_path
from opd_ds.engine import read_ds_config, student_ds_config
from opd_ds.errors import UserError
from tests.tiny import run_settings, write_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.stepps=20", r"^rollout\.stepps = 20: unknown key; allowed here: .*steps.* Did you mean 'steps'\?$"),
        ("tasks.one.teachr=x", r"^tasks\.one\.teachr = 'x': unknown key; .* Did you mean 'teacher'\?$"),
        ("student.ema.decy=0.5", r"^student\.ema\.decy = 0\.5: unknown key; .* Did you mean 'decay'\?$"),
        ("rolout.steps=20", r"^rolout: unknown key; allowed here: .* Did you mean 'rollout'\?$"),
        ("rollout.steps=0", r"^rollout\.steps = 0: .*more than 0"),
        ("rollout.steps=many", r"^rollout\.steps = 'many': allowed: a whole number$"),
        ("rollout.kernel=eular", r"^rollout\.kernel = 'eular': .*\. Did you mean 'euler'\?$"),
        ("tasks.one.teacher.placement=residnt", r"^tasks\.one\.teacher\.placement = .*Did you mean 'resident'\?$"),
        ("objective={method: closd_form}", r"^objective\.method = 'closd_form': .* Did you mean 'closed_form'\?$"),
        (
            "scoring.micro_batch=atuo",
            r"^scoring\.micro_batch = 'atuo': allowed: .*a whole number.*'auto'\. Did you mean 'auto'\?$",
        ),
        ("teech={algorithm: nft}", r"^teech: unknown key; .* Did you mean 'teach'\?$"),
        ("optimizer.betas=[0.5]", r"^optimizer\.betas: has 1 entries and needs more$"),
        ("student.lora.targets=3", r"^student\.lora\.targets = 3: .*allowed: a list"),
        ("tasks.three=null", r"^tasks\.three = null: .* there is nothing$"),
        ("rollout.kernel=heun", r"^rollout\.kernel = 'heun': .*'euler'.*'dpm2'"),
        ("rollout.guidance=-1", r"^rollout\.guidance = -1: allowed: at least 0$"),
        ("student.ema.decay=2", r"^student\.ema\.decay = 2: allowed: less than 1$"),
        ("optimizer.lr=.inf", r"^optimizer\.lr = inf: allowed: a finite number$"),
        ("student.kind=LoRA", r"^student\.kind = 'LoRA': allowed: 'full', 'lora'$"),
        ("optimizer.learning_rate=1e-4", r"Did you mean 'lr'\?$"),
        ("rollout.num_inference_steps=20", r"Did you mean 'steps'\?$"),
        ("run.learning_rate=1e-4", r"Did you mean 'optimizer\.lr'\?$"),
        ("tasks.one.teacher={path: x, guidance: 2,0}", r"^tasks\.one\.teacher: has the key 0, .* write 2\.0, not 2,0$"),
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


def test_a_section_that_is_given_as_a_word_is_told_its_key() -> None:
    """`objective: ppo` is no method, but nearly one."""
    with pytest.raises(UserError, match=r"objective = 'ppo': is a section with keys; write objective\.method: closed"):
        load_config("miniature", None, ["objective=ppo"])
    with pytest.raises(UserError, match=r"objective\.kind = 'ppo': unknown key; [^?]*\.$"):
        load_config("miniature", None, ["objective.kind=ppo"])
