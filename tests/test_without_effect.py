"""What would do nothing, in silence, is said at the dry run and at the start, and in the rounds that learn nothing."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_ds.cli.dry_run import describe
from opd_ds.cluster.world import World
from opd_ds.config.files import recipe_names
from opd_ds.config.loading import load_config, parse_config
from opd_ds.config.sections import EmaSection
from opd_ds.config.without_effect import settings_without_effect, share_of_start
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.rewards import Needs
from opd_ds.runs.export import export_checkpoint
from opd_ds.runs.resume import Start
from opd_ds.runs.train import train
from opd_ds.training.rl.advantages import equal_groups
from tests.runs import metrics
from tests.tiny import run_settings, write_lora

REWARDED = {"tasks__one__rewards": ["jpeg_compressibility"]}

IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "average": ({"student__ema__every": 8}, "student.ema.every = 8: the run has 3 optimizer steps"),
    "slow average": (
        {"student__ema": {"decay": 0.999, "warmup": False}},
        "student.ema.decay = 0.999: after 3 optimizer steps the average, which is evaluated and exported, is ",
    ),
    "no average": ({"student__ema": {"decay": 0, "every": 2}}, "student.ema.every is not read with student.ema"),
    "checkpoints": ({"run__checkpoint_every": 100}, "run.checkpoint_every = 100 is more than run.rounds = 3"),
    "warm-up": ({"optimizer__warmup_rounds": 3}, "optimizer.warmup_rounds = 3: the run ends after 3 rounds"),
    "learning rate": ({"optimizer__lr": 1e-15}, "optimizer.lr = 1e-15 moves no weight"),
    "scores": ({"run__eval_every": 2}, "run.eval_every = 2: no task or probe has both eval_prompts and rewards"),
    "late scores": ({"run__eval_every": 9}, "run.eval_every = 9 is more than run.rounds = 3"),
    "grids": ({"run__image_every": 2}, "run.image_every = 2: no grids without eval_prompts"),
    "evaluation": ({"evaluation__seed": 9}, "evaluation: no task or probe has eval_prompts"),
    "watch": ({"watch__every": 1}, "watch.every = 1: no task has rewards to watch"),
    "watched images": (
        REWARDED | {"watch": {"every": 1, "rollouts": 0}}, "watch.every = 1: neither watch.rollouts nor watch.held_out"
    ),
    "rewards": (REWARDED, "tasks.one.rewards score nothing without tasks.one.eval_prompts or watch.every"),
    "LoRA of a full student": ({"student__lora__rank": 5}, "student.lora is not read with student.kind = 'full'"),
    "text cache": ({"model__text_cache": "cache"}, "model.text_cache is not read with model.text_encoders = 'offload'"),
    "noise": ({"rollout__kernel": "flow"}, "rollout.kernel = 'flow' draws no noise with rollout.noise_level = 0"),
    "guidance off": ({"rollout__guidance": 0.0}, "rollout.guidance = 0 ignores the prompt: guidance is off at 1"),
    "guidance": ({"tasks__one__teacher__guidance": 0.45}, "tasks.one.teacher.guidance = 0.45 weakens the prompt"),
    "negative prompt": (
        {"model__negative_prompt": "blurry", "rollout__guidance": 1.0, "tasks__two__teacher__guidance": 1.0},
        "model.negative_prompt is not read where every guidance is 1",
    ),
    "weight": ({"tasks__one__weight": 1e-5}, "tasks.one.weight = 1e-05 is lost beside another task's 1"),
    "turns": ({"tasks__one__turns": 2}, "tasks.one.turns = 2 is not read with train.schedule = 'together'"),
    "rounds": (
        {"train__schedule": "alternate", "run__rounds": 1},
        "train.schedule = 'alternate': none of the 1 rounds trains task two",
    ),
    "gather": ({"rollout__gather": "once", "deepspeed": "zero2"}, "rollout.gather = 'once' is read under ZeRO-3 only"),
    "trusted base": ({"tasks__one__teacher__trust_base": True}, "tasks.one.teacher.trust_base is for LoRAs"),
}  # fmt: skip
# Of the settings that the other tests share.
USUAL = {
    "evaluation: no task",
    "student.lora is not read",
    "run.checkpoint_every = 100 is more",
    "/other' has another text_encoder, text_encoder_2, text_encoder_3, vae than model.path",
}


def said(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of a dry run."""
    caplog.clear()
    describe(parse_config(data), World(), Start())
    return [record.getMessage() for record in caplog.records if record.name == "opd_ds"]


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_without_effect_is_named(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    changes, expected = IDLE[name]
    lines = said(run_settings(tiny_world, tmp_path / "out", **changes), caplog)
    assert any(line.startswith(expected) for line in lines), lines
    assert all(len(line) <= 345 for line in lines)
    others = [line for line in lines if not any(part in line for part in (expected, *USUAL))]
    assert not others


def test_negative_prompts_of_a_set_that_no_guidance_reads(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red 3 on blue", "negative_prompt": "blurry"}\n')
    changes = {"tasks__one__prompts": str(prompts), "tasks__two__teacher__guidance": 1.0}
    unread = "tasks.one.prompts has negative prompts, which are not read where every guidance is 1"
    for guidance in (1.0, 2.0):
        data = run_settings(tiny_world, tmp_path / "out", **changes, rollout__guidance=guidance)
        assert (unread in said(data, caplog)) == (guidance == 1.0)


def test_weights_that_are_the_bases_own_are_named(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As teacher or as start: the folder itself, or a LoRA that was exported before it was trained."""
    empty = write_lora(tiny_world / "base", tmp_path / "empty")
    file = empty / "adapter_model.safetensors"
    save_file({key: v * ("lora_A" in key) for key, v in load_file(file).items()}, file)
    data = run_settings(tiny_world, tmp_path / "out", student__kind="lora", student__start=str(empty))
    data["tasks"]["one"]["teacher"] = {"path": str(tiny_world / "base"), "guidance": 2.0}
    lines = said(data, caplog)
    assert any("tasks.one.teacher.path = " in line and "is model.path itself" in line for line in lines)
    data["tasks"]["one"]["teacher"]["guidance"] = 4.5  # another one is something to learn
    assert not any("is model.path itself" in line for line in said(data, caplog))
    assert any("student.start = " in line and "all its lora_B are zero" in line for line in lines)
    assert not any("tasks.two" in line for line in lines)


def test_parts_of_a_teacher_that_are_not_read_are_named(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A text encoder that was trained along; the same one in half precision is no other."""
    lines = {}
    for name, change in {"trained": lambda v: v * 1.01, "half": lambda v: v.half()}.items():
        teacher = copytree(tiny_world / "other", tmp_path / name)
        file = teacher / "text_encoder_2" / "model.safetensors"
        state = load_file(tiny_world / "base" / "text_encoder_2" / "model.safetensors")
        save_file({key: change(v) if v.is_floating_point() else v for key, v in state.items()}, file, {"format": "pt"})
        for part in ("text_encoder", "text_encoder_3", "vae"):
            rmtree(teacher / part)
            (teacher / part).symlink_to(tiny_world / "base" / part)
        lines[name] = said(run_settings(tiny_world, tmp_path / "out", tasks__one__teacher__path=str(teacher)), caplog)
    (named,) = (line for line in lines["trained"] if "has another text_encoder_2 than model.path" in line)
    assert named.startswith("tasks.one.teacher.path = ")
    assert not any("has another" in line for line in lines["half"])


def test_targets_that_a_start_overrules_are_named(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = run_settings(tiny_world, tmp_path / "out", student__kind="lora", student__start=str(tiny_world / "adapter"))
    assert not any("student.lora.targets" in line for line in said(data, caplog))
    data["student"]["lora"]["targets"] = ["attn.to_q"]
    assert any("student.lora.targets is not read with student.start" in line for line in said(data, caplog))
    data["student"]["lora"]["targets"] = ["attn.to_qq"]
    with pytest.raises(UserError, match=r"student\.lora\.targets: .* match no module"):
        said(data, caplog)


def test_rounds_without_a_learning_rate_are_counted(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler that was written for a shorter run."""
    params = {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "total_num_steps": 4}
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"scheduler": {"type": "WarmupDecayLR", "params": params}}))
    for rounds, idle in ((4, None), (9, "has the learning rate 0 in 6 of 9 rounds")):
        lines = said(run_settings(tiny_world, tmp_path / "out", deepspeed=str(ds_config), run__rounds=rounds), caplog)
        assert any((idle or "learning rate 0") in line for line in lines) == bool(idle)


def test_no_recipe_has_settings_without_effect() -> None:
    configs = [load_config(name, None, ["run.output_dir=out"]) for name in recipe_names()]
    assert [line for config in configs for line in settings_without_effect(config)] == []


def test_guidance_of_a_turbo_model_is_warned_of() -> None:
    """Nothing in these folders says that they are distilled."""
    turbo = ["model.path=hub/Z-Image-Turbo", "rollout.guidance=1.0", "tasks.ocr.teacher.guidance=1.0"]
    said = settings_without_effect(load_config("mopd_z_image", None, turbo))
    assert [line.partition(":")[0] for line in said] == ["tasks.aesthetic.teacher.guidance = 6"]
    assert "by its name hub/Z-Image-Turbo is distilled to be drawn without guidance, which is 1" in said[0]


def test_how_much_of_an_average_is_the_start() -> None:
    assert share_of_start(EmaSection(decay=0.5, warmup=False, every=2), 7) == pytest.approx(0.5**3)
    assert share_of_start(EmaSection(decay=0.9), 1) == pytest.approx(2 / 11)
    assert share_of_start(EmaSection(every=8), 7) == 1.0


# ---- an average that was never updated ----


def test_an_average_that_was_never_updated_is_not_exported(
    tiny_world: Path, tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    """The last weights are, by the run and by `opd-ds export`, and the model card says so."""
    changes: dict[str, Any] = {"student__kind": "lora", "run__rounds": 2}
    folders = {}
    for name, ema in (("never", {"every": 8}), ("none", {"decay": 0.0})):
        folders[name] = tmp_path / name
        train(parse_config(run_settings(tiny_world, folders[name], **changes, student__ema=ema)), group)
    weights = {
        name: load_file(folder / "export" / "pytorch_lora_weights.safetensors") for name, folder in folders.items()
    }
    assert all(torch.equal(weights["never"][key], value) for key, value in weights["none"].items())
    assert any(value.any() for key, value in weights["never"].items() if "lora_B" in key)
    config = parse_config(run_settings(tiny_world, folders["never"], **changes, student__ema={"every": 8}))
    export_checkpoint(config, folders["never"] / "checkpoints" / "round-000002", tmp_path / "exported", averaged=True)
    exported = load_file(tmp_path / "exported" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in weights["none"].items())
    assert "the average was never updated" in caplog.text
    assert "not averaged: the average was never updated" in (tmp_path / "exported" / "README.md").read_text()


# ---- rounds that learn nothing ----


def test_groups_that_teach_nothing_are_counted() -> None:
    nan = float("nan")
    rewards = torch.tensor([0.0, 0, 0, 1, 1, 2, nan, 3, nan, nan, nan, nan, 5, 5, nan])
    assert equal_groups(rewards, 3) == 4  # equal, one alone, none, two equal


class Blind:
    """Finds every image as bad as the other."""

    name = "blind"
    needs: ClassVar[Needs] = Needs()

    def identity(self) -> dict[str, Any]:
        return {}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> Tensor:
        return torch.zeros(len(images))


@pytest.mark.parametrize("again", [50, 2])
def test_equal_rewards_are_said_now_and_then(
    tiny_world: Path,
    tmp_path: Path,
    group: Group,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    again: int,
) -> None:
    monkeypatch.setattr("opd_ds.runs.rewards.build", lambda name, **_: Blind())
    monkeypatch.setattr("opd_ds.training.rl.judging._SAID_AGAIN", again)
    data = run_settings(tiny_world, tmp_path / "out", rollout__samples=8)
    data["tasks"] = {"dull": {"prompts": str(tiny_world / "prompts.txt"), "rewards": ["jpeg_compressibility"]}}
    data["teach"] = {"algorithm": "nft", "group": 4}
    train(parse_config(data), group)
    assert [row["rollout/dull/equal_groups"] for row in metrics(tmp_path / "out")] == [2, 2, 2]
    lines = [record.getMessage() for record in caplog.records if "equal rewards" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == (["round 1"] if again == 50 else ["round 1", "round 3"])
    assert "can jpeg_compressibility tell such images apart?" in lines[0]


def test_rewards_without_a_weight_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    reward = {"name": "jpeg_compressibility", "weight": 0}
    data = run_settings(tiny_world, tmp_path / "out", rollout__samples=8)
    data["tasks"] = {"dull": {"prompts": str(tiny_world / "prompts.txt"), "rewards": [reward]}}
    data["teach"] = {"algorithm": "nft", "group": 4}
    with pytest.raises(UserError, match=r"tasks\.dull: rewards: every weight is 0"):
        parse_config(data)


def test_a_teacher_that_is_the_student_is_said(
    tiny_world: Path, tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    data = run_settings(tiny_world, tmp_path / "out", run__rounds=2)
    data["tasks"]["one"]["teacher"] = {"path": str(tiny_world / "base"), "guidance": 2.0}
    train(parse_config(data), group)
    lines = [record.getMessage() for record in caplog.records if "predicts exactly" in record.getMessage()]
    assert [line.partition(" so ")[0] for line in lines] == [
        "round 1: the teacher of task one predicts exactly what the student predicts,"
    ]
