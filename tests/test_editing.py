"""Runs that edit pictures beside drawing images: one student, the same round however it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.tables import comparison_grid
from opd_ds.models.prompt_encoding import PromptEncoding
from opd_ds.plan.devices import parse_devices
from opd_ds.plan.inputs import network_inputs
from opd_ds.plan.memory import run_memory
from opd_ds.runs.encode import encode_prompts
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.preflight import preflight
from opd_ds.runs.reward_eval import AsyncRewardEval
from opd_ds.runs.setup import prepare
from opd_ds.runs.train import train
from opd_ds.testing.tiny import flux_kontext, qwen_image_edit
from opd_ds.testing.tiny.parts import painting
from opd_ds.training.networks import load_family
from opd_ds.utils.pictures import Picture
from tests.ranks import launch
from tests.runs import assert_close, gradients_of, metrics, write_sgd
from tests.tiny import ALL_SHARDED, PROMPTS, costs_of, run_settings, with_changes, write_config

WRITERS = {"flux_kontext": flux_kontext.write, "qwen_image_edit": qwen_image_edit.write}
PROPORTIONS = [(88, 64), (64, 88), (70, 70), (88, 64), (64, 88)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families with a base and a teacher each, prompts, and edits of pictures of three proportions."""
    root = tmp_path_factory.mktemp("editing")
    for family, write in WRITERS.items():
        write(root / family / "base")
        write(root / family / "other", seed=5)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    rows = []
    for number, size in enumerate(PROPORTIONS):
        painting(number, size).save(root / f"{number}.png")
        rows.append({"prompt": f"make it {number % 2}", "image": f"{number}.png"})
    (root / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def settings(world: Path, family: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A task that edits and one that draws; random queries and noise, samples that no number of ranks divides."""
    teacher = {"path": str(world / family / "other"), "guidance": 2.0}
    edits = {"path": str(world / "edits.jsonl"), "pictures": "image"}
    data = run_settings(
        world,
        folder,
        model={"family": family, "path": str(world / family / "base"), "max_text_length": 24},
        model__height=16,
        model__width=16,
        model__reference_side=48,
        rollout__samples=7,
        rollout__kernel="flow",
        rollout__noise_level=0.5,
        rollout__trained_steps={"queries": 2},
        student={"kind": "full"},
        tasks={
            "edit": {"teacher": teacher, "prompts": edits, "eval_prompts": edits},
            "draw": {"teacher": teacher, "prompts": str(world / "prompts.txt")},
        },
    )
    return with_changes(data, changes)


def config_of(world: Path, family: str, folder: Path, **changes: Any) -> DistilConfig:
    return DistilConfig.model_validate(settings(world, family, folder, **changes))


CUTS: dict[str, dict[str, Any]] = {
    "small micro-batches": {"train__micro_batch": 3, "rollout__micro_batch": 2, "scoring__micro_batch": 5},
    "stage 3": {"stage": 3},
    "fused at stage 3": {"rollout__mode": "fused", "rollout__micro_batch": 3, "stage": 3},
}


def test_the_gradient_of_edits_and_images_does_not_depend_on_how_the_round_is_cut(
    world: Path, tmp_path: Path, group: Group
) -> None:
    def gradients(stage: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
        sgd = {"optimizer": {"lr": 1.0, "max_grad_norm": 0.0}, "deepspeed": write_sgd(tmp_path, stage)}
        return gradients_of(config_of(world, "flux_kontext", tmp_path / "out", **(sgd | changes)), group)

    expected = gradients()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, changes in CUTS.items():
        found = gradients(**changes)
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-5 * scale + 1e-7, f"{name}: gradients differ by {worst} at scale {scale}"


@pytest.mark.extended
@pytest.mark.multirank
def test_two_ranks_edit_as_one_rank_does_and_go_on_bit_for_bit(world: Path, tmp_path: Path, group: Group) -> None:
    """Where the text encoder sees the pictures, with negative prompts too, and layers are gathered one by one."""
    changes = {"run__rounds": 2, "run__checkpoint_every": 1, "rollout__samples": 5}
    one = config_of(world, "qwen_image_edit", tmp_path / "one", deepspeed="zero0", **changes)
    train(one, group)
    whole = metrics(tmp_path / "one")
    train(one, group, str(tmp_path / "one" / "checkpoints" / "round-000001"))
    assert metrics(tmp_path / "one") == whole
    changes |= {"deepspeed": ALL_SHARDED, "rollout__gather": "per_layer", "train__micro_batch": 3}
    sharded = settings(world, "qwen_image_edit", tmp_path / "two", **changes)
    launch(2, "--config", str(write_config(tmp_path / "two.yaml", sharded)))
    assert_close(metrics(tmp_path / "two"), whole)


def a_round(config: DistilConfig, group: Group) -> tuple[dict[str, Any], list[bytes]]:
    """What a round measures, and the latents and drawings of it and after it, to the last bit."""
    parts = prepare(config, group)
    report = parts.trainer.run_round(0)
    drawn = parts.evaluator.draw(parts.student.module, {"edit": 2.0}, 3)
    pictures = [image.tobytes() for shown in drawn.values() for _, image in shown]
    latents = [final.numpy().tobytes() for rolled in report.rolled.values() for final in rolled.final]
    return report.losses.means, latents + pictures


@pytest.mark.parametrize("family", WRITERS)
def test_cached_pictures_train_the_same_and_are_never_decoded(
    world: Path, tmp_path: Path, group: Group, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(world, family, tmp_path / "out")
    offloaded = a_round(config, group)
    cached = config_of(world, family, tmp_path / "out", model__text_encoders="cached")
    with pytest.raises(UserError, match="there is none yet for"):
        preflight(cached, group, group.world, None)
    encode_prompts(config, group)
    preflight(cached, group, group.world, None)
    monkeypatch.setattr(PromptEncoding, "load_encoders", lambda _: pytest.fail("text encoders were loaded"))
    monkeypatch.setattr(PromptEncoding, "fit", lambda *_: pytest.fail("a picture was resized"))
    found = a_round(cached, group)
    if family == "flux_kontext":
        assert found == offloaded
    assert found[0]["edit"] == offloaded[0]["edit"]  # other texts are padded to the longest of a pass, which rounds
    assert found[0]["draw"] == pytest.approx(offloaded[0]["draw"], rel=1e-5)
    other = config_of(world, family, tmp_path / "out", model__text_encoders="cached", model__reference_side=80)
    with pytest.raises(UserError, match="are not encoded, the first: the reference picture with sha256"):
        preflight(other, group, group.world, None)


def test_rewards_see_the_pictures_of_each_image(world: Path, tmp_path: Path, group: Group) -> None:
    """Of rollouts that are watched or learned from, and in both evaluations. The score is the picture's own size."""
    file = tmp_path / "own.py"
    file.write_text(
        "def size(images, prompts, metadata, references):\n"
        "    return [own[0].width + 1000 * own[0].height if own else None for own in references]\n"
        "size.takes_references = True\n"
    )
    mean = sum(width + 1000 * height for width, height in PROPORTIONS) / len(PROPORTIONS)
    changes = {"rollout__samples": 10, "tasks__edit__rewards": [f"{file}:size"], "watch": {"every": 1, "rollouts": 10}}
    config = config_of(world, "flux_kontext", tmp_path / "out", **changes)
    parts = prepare(config, group)
    watch = AsyncRewardEval(config, parts.rewards)
    watch.submit(1, parts.trainer.run_round(0).rolled, {})
    assert [(record.mean, record.judged) for record in watch.close(lambda: None)] == [(mean, 10)]
    scores = parts.evaluator.run(parts.student.module, {"edit": 2.0}).scores
    assert scores == {"edit": {"size": mean}}
    found = evaluate(config, Choice(), group, lambda *_: None)
    assert found["scores"]["base"]["edit"]["size"]["mean"] == mean
    data = settings(world, "flux_kontext", tmp_path / "learned", **changes)
    del data["tasks"]["draw"], data["tasks"]["edit"]["teacher"]
    data["rollout"] |= {"trained_steps": {"fraction": 0.99}, "samples": 10}
    learned = parse_config(data | {"teach": {"algorithm": "guard", "group": 2, "kl": 0.0}})
    report = prepare(learned, group).trainer.run_round(0)
    assert (report.scores["edit/mean"], report.scores["edit/left_out"]) == (mean, 0)


def test_images_are_drawn_again_when_their_pictures_change(world: Path, tmp_path: Path, group: Group) -> None:
    evaluate(config_of(world, "flux_kontext", tmp_path / "out"), Choice(), group)
    files = sorted((tmp_path / "out" / "eval" / "images" / "base" / "edit").glob("*.png"))
    before = [file.read_bytes() for file in files]
    assert len(before) == len(PROPORTIONS)
    rows = [json.loads(line) for line in (world / "edits.jsonl").read_text().splitlines()]
    painting(9, PROPORTIONS[2]).save(tmp_path / "new.png")
    rows[2]["image"] = str(tmp_path / "new.png")
    for row in rows[:2] + rows[3:]:
        row["image"] = str(world / row["image"])
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    edits = {"path": str(changed), "pictures": "image"}
    evaluate(config_of(world, "flux_kontext", tmp_path / "out", tasks__edit__eval_prompts=edits), Choice(), group)
    after = sorted((tmp_path / "out").glob("eval*/images/base/edit/*.png"))[-len(before) :]
    assert [one != other.read_bytes() for one, other in zip(before, after, strict=True)] == [
        number == 2 for number in range(len(before))
    ]


def test_grids_show_the_picture_above_the_images() -> None:
    images = [painting(number, (96, 96)) for number in range(3)]
    models = {"base": {"edit": images[:1], "draw": images[1:2]}}
    prompts = {"edit": ["a"], "draw": ["b"]}
    plain, shown = (comparison_grid(models, prompts, edited) for edited in ({}, {"edit": images[2:], "draw": []}))
    assert plain is not None
    assert shown is not None
    step = shown.height - plain.height
    assert step > 96
    header = plain.height - step
    assert shown.getpixel((200, header + 40)) == images[2].getpixel((50, 40))
    assert (
        shown.crop((0, header + step, shown.width, shown.height)).tobytes()
        == plain.crop((0, header, plain.width, plain.height)).tobytes()
    )


def test_what_a_family_does_not_take_is_refused_before_anything_loads(
    world: Path, tiny_world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Picture, "load", lambda _: pytest.fail("a picture was decoded"))
    edits = {"path": str(world / "edits.jsonl"), "pictures": "image"}
    plain = DistilConfig.model_validate(run_settings(tiny_world, tmp_path / "out", tasks__one__prompts=edits))
    with pytest.raises(UserError, match=r"^tasks\.one\.prompts: line 1 has 1 reference pictures, .*takes none"):
        preflight(plain, group, group.world, None)
    rows = [{"prompt": "a", "image": ["0.png", "1.png"]}]
    (world / "two.jsonl").write_text(json.dumps(rows[0]) + "\n")
    two = config_of(
        world,
        "flux_kontext",
        tmp_path / "out",
        tasks__edit__prompts={"path": str(world / "two.jsonl"), "pictures": "image"},
    )
    with pytest.raises(UserError, match=r"line 1 has 2 reference pictures, .*takes at most 1 of a prompt"):
        preflight(two, group, group.world, None)


def test_rewards_that_the_prompts_or_the_model_do_not_fit_are_refused_before_anything_loads(
    world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_ds.rewards.base.Needs.absent_packages", lambda _: [])
    monkeypatch.setattr("opd_ds.rewards.weights.Weights.find", lambda self: self.place)

    def refusal(**changes: Any) -> str:
        with pytest.raises(UserError) as error:
            preflight(config_of(world, "flux_kontext", tmp_path / "out", **changes), group, group.world, None)
        return str(error.value)

    said = refusal(tasks__draw__rewards=["dino"])
    assert said.startswith("tasks.draw.rewards: reward dino looks at reference pictures, and the prompts of ")
    said = refusal(tasks__edit__rewards=[{"name": "mix", "options": {"parts": {"clip_direction": 1}}}])
    assert "reads the column 'source_caption', and 5 of 5 prompts of tasks.edit.prompts have none, the first: " in said
    own = tmp_path / "own.py"
    own.write_text("def f(images, prompts, metadata): return [0] * len(images)\nf.takes_clips = True\n")
    assert "f takes clips, the model draws images" in refusal(tasks__edit__rewards=[f"{own}:f"])
    preflight(
        config_of(world, "flux_kontext", tmp_path / "out", tasks__edit__rewards=["dino", "lpips"]),
        group, group.world, None,
    )  # fmt: skip


def test_pictures_cut_off_are_found_before_networks_load(
    world: Path, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (world / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.jsonl").write_text(json.dumps({"prompt": "a", "image": "cut.png"}) + "\n")
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("a network was loaded"))
    edits = {"path": str(tmp_path / "cut.jsonl"), "pictures": "image"}
    config = config_of(world, "flux_kontext", tmp_path / "out", tasks__edit__eval_prompts=edits)
    with pytest.raises(UserError, match=r"^tasks\.edit\.eval_prompts: line 1: image = 'cut.png': damaged"):
        prepare(config, group)


@pytest.mark.parametrize("family", WRITERS)
def test_the_plan_counts_what_pictures_add(world: Path, tmp_path: Path, family: str) -> None:
    config = config_of(world, family, tmp_path / "out", model__text_encoders="resident", precision="fp32")
    tasks = {"draw": settings(world, family, tmp_path / "out")["tasks"]["draw"]}
    costs, plain = costs_of(config), costs_of(config_of(world, family, tmp_path / "out", tasks=tasks))
    model = load_family(config, world / family / "base", torch.device("cpu"))
    painting(0, (48, 48)).save(tmp_path / "square.png")
    square = Picture.find(tmp_path / "square.png", "", "")
    cond = model.encode(["a"], [(square,)])
    heard: dict[str, torch.Tensor] = {}
    network = model.load_transformer()
    network.register_forward_pre_hook(lambda m, a, k: heard.update(k), with_kwargs=True)
    with torch.no_grad():
        model.velocity(network, torch.randn(1, *model.latent_shape), torch.tensor([0.5]), cond)
    assert costs.model.references == [tuple(latents.shape[1:]) for latents in cond.stacked_references()]
    shapes = model.latent_shape, 1, costs.model.tokens, torch.float32, costs.model.references
    planned = network_inputs(model.transformer_class, costs.model.configs["transformer"], *shapes)
    assert planned["hidden_states"].shape == heard["hidden_states"].shape
    # The tiny processor makes 2 x 2 tokens of the picture, and nothing sees it in the other family.
    assert costs.model.tokens - plain.model.tokens == (4 if model.sees_pictures else 0)
    assert costs.train(1, checkpointing=False).saved > 1.5 * plain.train(1, checkpointing=False).saved
    assert costs.encode_pictures.saved == cond.references[0][0].nbytes
    parts = {part.name for part in run_memory(config, costs, parse_devices("2xcpu", "--gpu")).device}
    assert {"VAE encode", "reference pictures"} <= parts
