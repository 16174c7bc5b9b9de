"""`opd-ds eval`: the same noise for all, nothing done twice, folders, the command. Of runs: tests/test_eval_runs.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.data import PromptSet
from opd_ds.diffusion.noise import SampleNoise
from opd_ds.engine import Group
from opd_ds.errors import IncompleteError, UserError
from opd_ds.evaluation.pictures import Painter, items
from opd_ds.evaluation.results import RESULTS_FILE, Results, read_results
from opd_ds.evaluation.store import PictureStore
from opd_ds.models.sd3 import SD3
from opd_ds.runs import rewards as reward_building
from opd_ds.runs.evaluate import Choice, evaluate
from opd_ds.runs.model_specs import Requests
from tests.evaluations import means, settings
from tests.ranks import launch
from tests.tiny import PROMPTS, write_config

Evaluate = Callable[..., Results]


@pytest.fixture
def eval_run(tiny_world: Path, tmp_path: Path, group: Group) -> Evaluate:
    """Evaluate in this process; keyword arguments as for `run_settings`."""

    def start(choice: Choice | None = None, folder: str = "out", **changes: Any) -> Results:
        config = DistilConfig.model_validate(settings(tiny_world, tmp_path / folder, **changes))
        return evaluate(config, choice or Choice(), group)

    return start


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images decoded, one number per micro-batch."""
    counts: list[int] = []
    decode = SD3.decode

    def counting(self: SD3, latents: torch.Tensor) -> torch.Tensor:
        counts.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(SD3, "decode", counting)
    return counts


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images given to a reward, one number per call."""
    counts: list[int] = []
    build = reward_building.build

    def watched(name: str, **options: Any) -> Any:
        reward = build(name, **options)
        score = reward.score

        def counting(images: Any, prompts: Any, metadata: Any = None) -> torch.Tensor:
            counts.append(len(images))
            return score(images, prompts, metadata)

        reward.score = counting  # type: ignore[method-assign]
        return reward

    monkeypatch.setattr(reward_building, "build", watched)
    return counts


# ---- what comes out ----


def test_the_promised_files_and_numbers(eval_run: Evaluate, tmp_path: Path) -> None:
    results = eval_run(evaluation__samples_per_prompt=2)
    folder = tmp_path / "out" / "eval"
    assert read_results(folder / "results.json") == results
    assert list(results["models"]) == ["base", "teacher:one", "teacher:two"]
    assert results["metrics"] == [
        ["one", "miniature_look"],
        ["two", "miniature_composition"],
        ["two", "miniature_look"],
    ]
    entry = results["scores"]["teacher:two"]["two"]["miniature_look"]
    pictures = np.array(entry["per_picture"], dtype=float)
    assert pictures.shape == (len(PROMPTS), 2)
    assert entry["n"] == pictures.size
    assert entry["nan"] == 0
    np.testing.assert_allclose(entry["per_prompt"], pictures.mean(1))
    assert entry["mean"] == pytest.approx(pictures.mean())
    assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
    # Two prompts name no colours: the composition reward cannot judge them, and that is counted, not averaged.
    lacking = results["scores"]["base"]["two"]["miniature_composition"]
    assert (lacking["n"], lacking["nan"]) == (6, 4)
    assert [score is None for score in lacking["per_prompt"]] == [False, False, False, True, True]
    assert len(list((folder / "images" / "teacher-one" / "two").glob("*.png"))) == 2 * len(PROMPTS)
    lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 2
    markdown = (folder / "results.md").read_text()
    assert "| base |" in markdown
    assert "teacher:two" in markdown
    assert (folder / "report.html").stat().st_size > 10_000


def test_pictures_are_those_that_diffusers_draws_for_prompt_and_index(
    eval_run: Evaluate, tiny_world: Path, tmp_path: Path
) -> None:
    """The image of (prompt, index), by an independent pipeline, with guidance; in both sets it is the same."""
    eval_run(evaluation__samples_per_prompt=2)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "base")
    pipeline.set_progress_bar_config(disable=True)
    item = next(i for i in items(PromptSet.read(tiny_world / "prompts.txt"), 2) if (i.number, i.sample) == (3, 1))
    picture = pipeline(
        item.prompt,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=SampleNoise([item.seed(1234)], (4, 8, 8)).draw(slice(None)),
        max_sequence_length=10,
        height=16,
        width=16,
        output_type="np",
    ).images[0]
    images = tmp_path / "out" / "eval" / "images" / "base"
    for name in ("one", "two"):
        ours = np.asarray(Image.open(images / name / "00003-1.png"), dtype=np.float64) / 255
        np.testing.assert_allclose(ours, picture, atol=1.01 / 255)


def test_all_models_get_the_same_noise(eval_run: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds asked for per model are the same list, and no two images of a set share one."""
    asked: list[list[int]] = []
    init = SampleNoise.__init__

    def watched(self: SampleNoise, seeds: list[int], shape: tuple[int, ...]) -> None:
        asked.append(seeds)
        init(self, seeds, shape)

    monkeypatch.setattr(SampleNoise, "__init__", watched)
    eval_run(evaluation__samples_per_prompt=2)
    per_model = [sorted(seed for part in asked[2 * k : 2 * k + 2] for seed in part) for k in range(3)]
    assert per_model[0] == per_model[1] == per_model[2]
    assert len(set(asked[0])) == 2 * len(PROMPTS)


def test_a_text_that_comes_twice_has_noise_of_its_own_and_more_samples_change_nothing() -> None:
    prompts = PromptSet(("a", "b", "a"), ({},) * 3, "")
    few, many = items(prompts, 1), items(prompts, 3)
    seeds = {(item.number, item.sample): item.seed(7) for item in many}
    assert len(set(seeds.values())) == 9
    assert {(item.number, item.sample): item.seed(7) for item in few}.items() <= seeds.items()
    assert [item.seed(7) for item in items(prompts, 1, limit=2)] == [seeds[0, 0], seeds[1, 0]]


# ---- resuming ----


def test_what_is_finished_is_not_done_again(
    eval_run: Evaluate, drawn: list[int], scored: list[int], tmp_path: Path
) -> None:
    first = eval_run()
    total = 3 * 2 * len(PROMPTS)
    # Both tasks have the same prompts, and a model one guidance: what is the same image is judged once.
    assert (sum(drawn), sum(scored)) == (total, total)
    drawn.clear()
    scored.clear()
    second = eval_run()
    unjudged = sum(e["nan"] for s in first["scores"].values() for labels in s.values() for e in labels.values())
    assert second == first
    assert drawn == []
    assert sum(scored) == unjudged / 2  # what could not be judged is asked again, nothing else

    (tmp_path / "out" / "eval" / "images" / "base" / "one" / "00002-0.png").unlink()
    eval_run()
    assert drawn == [1]
    drawn.clear()
    eval_run(evaluation__samples_per_prompt=2)
    assert sum(drawn) == total


@pytest.mark.parametrize(
    ("changes", "redrawn"),
    [
        ({"evaluation__steps": 5}, 30),
        ({"evaluation__seed": 5}, 30),
        ({"model__negative_prompt": "ugly"}, 30),
        ({"model__negative_prompt": ""}, 0),  # what is taken anyway
        ({"rollout__guidance": 3.0}, 10),  # the student's and the base's; teachers have their own
        ({"tasks__one__teacher__guidance": 1.5}, 10),
        ({"evaluation__micro_batch": 3}, 0),
        ({"run__seed": 5}, 0),
    ],
)
def test_a_changed_setting_redraws_what_it_decides(
    eval_run: Evaluate, drawn: list[int], changes: dict[str, Any], redrawn: int
) -> None:
    eval_run()
    drawn.clear()
    eval_run(**changes)
    assert sum(drawn) == redrawn


def test_another_model_under_the_same_name_is_drawn_and_scored_anew(
    eval_run: Evaluate, drawn: list[int], scored: list[int], tiny_world: Path
) -> None:
    def choice(path: str) -> Choice:
        return Choice(Requests(defaults=False, models=[f"mine={tiny_world / path}"]), rewards=["miniature_look"])

    first = eval_run(choice("adapter"))
    drawn.clear()
    scored.clear()
    second = eval_run(choice("adapter2"))
    assert (sum(drawn), sum(scored)) == (10, 5)
    assert means(first) != means(second)


def test_another_reward_under_the_same_label_scores_anew(
    eval_run: Evaluate, drawn: list[int], scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    eval_run()
    drawn.clear()
    scored.clear()
    monkeypatch.setattr("opd_ds.miniature.rewards.LookReward.identity", lambda self: {"engine": "a later one"})
    eval_run()
    assert drawn == []
    assert sum(scored) == 3 * len(PROMPTS) + 3 * 2  # and the two prompts that composition cannot judge


def test_scores_survive_a_line_cut_off_by_a_kill(eval_run: Evaluate, scored: list[int], tmp_path: Path) -> None:
    choice = Choice(rewards=["miniature_look"])
    first = eval_run(choice)
    file = tmp_path / "out" / "eval" / "scores" / "rank-000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    for _ in range(2):
        scored.clear()
        assert eval_run(choice) == first
    assert scored == []  # the line after the cut-off one was written whole


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = PictureStore(tmp_path), Path("m/s/00000-0.png")
    picture = Image.new("RGB", (4, 4), "red")
    store.write(file, picture, {"prompt": "ä"})
    assert store.finished(file, {"prompt": "ä"})
    assert not store.finished(file, {"prompt": "b"})
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.write(Path("m/s/00001-0.png"), picture, {})
    assert not store.finished(Path("m/s/00001-0.png"), {})
    assert store.read(file).getpixel((0, 0)) == (255, 0, 0)


def test_a_reward_that_breaks_leaves_a_gap(
    eval_run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr("opd_ds.miniature.rewards.LookReward.score", broken)
        with pytest.raises(IncompleteError, match="no image has a score by miniature_look"):
            eval_run()
    results = read_results(tmp_path / "out" / "eval" / RESULTS_FILE)
    entry = results["scores"]["base"]["one"]["miniature_look"]
    assert (entry["n"], entry["nan"], entry["mean"], entry["ci95"]) == (0, len(PROMPTS), None, [None, None])
    assert "the server is gone" in caplog.text
    assert eval_run()["scores"]["base"]["one"]["miniature_look"]["n"] == len(PROMPTS)


# ---- models ----


def test_models_prompts_and_guidance_by_option(eval_run: Evaluate, tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "a red 3 on blue", "tag": "x"}) + "\n")
    requests = Requests(
        models=[f"full={tiny_world / 'other'}", f"file={tiny_world / 'adapter' / 'adapter_model.safetensors'}"],
        guidance=["full=1.0"],
    )
    results = eval_run(Choice(requests, [f"more={tmp_path / 'more.jsonl'}"], ["jpeg", "miniature_look"][1:], limit=2))
    assert list(results["models"]) == ["base", "teacher:one", "teacher:two", "full", "file"]
    assert list(results["sets"]) == ["one", "two", "more"]
    found = means(results)
    # The same weights at the same guidance, under another name.
    assert found["full/one/miniature_look"] == pytest.approx(found["teacher:one/one/miniature_look"])
    assert found["file/one/miniature_look"] != pytest.approx(found["base/one/miniature_look"])
    assert results["scores"]["base"]["one"]["miniature_look"]["n"] == 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(Requests(models=["x=./gone"])), r"--model x = './gone': no such file.*or one of base, student"),
        (Choice(Requests(models=["student"])), r"--model student=student: .*export does not exist"),
        (Choice(Requests(models=["base=./gone"])), r"there is a model 'base' already"),
        (Choice(Requests(models=["x=teacher:three"])), r"no such task; there are one, two"),
        (Choice(Requests(models=["checkpoint:latest"])), r"there are no checkpoints"),
        (Choice(Requests(models=["teacher-one=base"])), r"would share a folder"),
        (Choice(Requests(models=["a/b=base"])), r"a name may hold letters"),
        (Choice(Requests(defaults=False)), r"no models to evaluate"),
        (Choice(Requests(guidance=["nobody=1"])), r"--guidance nobody=1: no such model"),
        (Choice(Requests(guidance=["base=high"])), r"expected NAME=NUMBER"),
        (Choice(prompts=["one=x.txt"]), r"--prompts one=x.txt: expected NAME=FILE with a new name"),
        (Choice(rewards=["beauty"]), r"unknown reward"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_drawn(
    eval_run: Evaluate, drawn: list[int], choice: Choice, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        eval_run(choice)
    assert "\n" not in str(caught.value)
    assert drawn == []


def test_a_model_of_another_architecture_is_refused(eval_run: Evaluate, tiny_world: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_world / "other" / "transformer" / "config.json").read_text())
    folder = shutil.copytree(tiny_world / "other", tmp_path / "odd") / "transformer"
    (folder / "config.json").write_text(json.dumps(config | {"patch_size": 1}))
    with pytest.raises(UserError, match="patch_size"):
        eval_run(Choice(Requests(models=[f"odd={folder.parent}"])))


# ---- the command ----


@pytest.mark.multirank
def test_two_ranks_give_the_results_of_one(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    """The command under the real launcher; five prompts do not divide by two."""
    file = write_config(tmp_path / "run.yaml", settings(tiny_world, tmp_path / "two"))
    launch(2, "--config", str(file), command="eval")
    two = read_results(tmp_path / "two" / "eval" / "results.json")
    one = evaluate(DistilConfig.model_validate(settings(tiny_world, tmp_path / "one")), Choice(), group)
    assert means(two) == pytest.approx(means(one), rel=1e-3, nan_ok=True)
    # Each rank judged a part.
    ranks = sorted(path.name for path in (tmp_path / "two" / "eval" / "scores").iterdir())
    assert ranks == ["rank-000.jsonl", "rank-001.jsonl"]
    assert {k: v for k, v in two.items() if k not in ("scores", "normalised_average")} == {
        k: v for k, v in one.items() if k not in ("scores", "normalised_average")
    }


def test_the_command_in_one_process(tiny_world: Path, tmp_path: Path, group: Group) -> None:
    file = write_config(tmp_path / "run.yaml", settings(tiny_world, tmp_path / "out"))
    launch(1, "--config", str(file), "--limit", "2", "--no-defaults", "--model", "base", command="eval")
    results = tmp_path / "out" / "eval" / "results.json"
    assert read_results(results)["scores"]["base"]["one"]["miniature_look"]["n"] == 2
    compared = CliRunner().invoke(app, ["eval", "--compare", str(results), str(results)])
    assert compared.exit_code == 0
    assert "same weights" in compared.output


def test_an_evaluation_that_is_done_loads_no_network(eval_run: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    eval_run()
    monkeypatch.setattr(SD3, "load_transformer", lambda *_: pytest.fail("a network was loaded"))
    monkeypatch.setattr(SD3, "encode", lambda *_: pytest.fail("a prompt was encoded"))
    monkeypatch.setattr(Painter, "draw", lambda *_: pytest.fail("an image was drawn"))
    eval_run()


def test_another_evaluation_takes_a_folder_of_its_own_and_draws_nothing_again(
    eval_run: Evaluate, tmp_path: Path, drawn: list[int], scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    everything = eval_run(Choice(limit=2))
    first = tmp_path / "out" / "eval"
    before = {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    images, calls = sum(drawn), sum(scored)
    part = eval_run(Choice(limit=2, rewards=["miniature_look"]))  # one reward fewer: another evaluation
    second = tmp_path / "out" / "eval-2"
    assert {file: file.read_bytes() for file in before} == before
    assert read_results(second / "results.json") == part
    assert f"{second / 'results.json'}" in capsys.readouterr().out
    assert (sum(drawn), sum(scored)) == (images, calls)  # taken from the first
    for model in everything["models"]:
        assert part["scores"][model]["one"]["miniature_look"] == everything["scores"][model]["one"]["miniature_look"]
    more = eval_run(Choice(limit=3))  # all of the first and more: the same folder
    assert read_results(first / "results.json") == more
    other = eval_run(Choice(limit=3), evaluation__seed=5)  # neither the first's nor the second's
    assert read_results(tmp_path / "out" / "eval-3" / "results.json") == other


def test_a_named_folder_is_taken_or_refused(eval_run: Evaluate, tmp_path: Path, drawn: list[int]) -> None:
    named = tmp_path / "mine"
    eval_run(Choice(limit=2, output=named))
    assert sorted(file.name for file in named.iterdir()) == [
        "images", "report.html", "results.csv", "results.json", "results.md", "scores",
    ]  # fmt: skip
    assert not (tmp_path / "out" / "eval").exists()
    eval_run(Choice(limit=2, output=named))
    images = sum(drawn)
    for choice, lost in (
        (Choice(limit=1, output=named), "prompt set one with 2 prompts of 1 samples"),
        (Choice(Requests(defaults=False, models=["base"]), limit=2, output=named), "model teacher:one"),
        (Choice(Requests(guidance=["base=3"]), limit=2, output=named), "model base with guidance 2 on one"),
        (Choice(rewards=["miniature_look"], limit=2, output=named), "reward miniature_composition on one"),
    ):
        with pytest.raises(UserError, match=f"holds another evaluation, of which this one would not keep {lost};"):
            eval_run(choice)
    assert sum(drawn) == images


def test_a_run_under_way_keeps_its_folder(eval_run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    eval_run(Choice(limit=1))
    assert (tmp_path / "out" / "eval-2" / "results.json").is_file()
    assert not (tmp_path / "out" / "eval").exists()


def test_prompts_on_the_command_line_are_mapped_as_in_a_config(eval_run: Evaluate, tmp_path: Path) -> None:
    rows = [("ocr", "a"), ("ocr", "b"), ("look", "c"), ("ocr", "a"), ("ocr", "d")]
    file = tmp_path / "rows.csv"
    file.write_text("kind,caption\n" + "".join(f"{kind},{caption}\n" for kind, caption in rows))
    keys = f"{{path: {file}, column: caption, where: {{kind: ocr}}, unique: true, limit: 2}}"
    results = eval_run(Choice(Requests(defaults=False, models=["base"]), prompts=[f"more={keys}"]))
    assert results["sets"]["more"]["prompts"] == ["a", "b"]
    with pytest.raises(UserError, match=r"--prompts more: colum = 'x': unknown key; .*Did you mean 'column'"):
        eval_run(Choice(prompts=[f"more={{path: {file}, colum: x}}"]))


def test_the_command_says_json(tiny_world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", settings(tiny_world, tmp_path / "out"))
    arguments = ["--config", str(file), "--limit", "1", "--json", "--output", str(tmp_path / "here")]
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    data = json.loads(result.stdout)
    assert data["results"] == str(tmp_path / "here" / "results.json")
    assert data["scores"]["base"]["one"]["miniature_look"].keys() == {"n", "nan", "mean", "ci95"}
