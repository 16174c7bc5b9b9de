"""Prompts with negative prompts of their own: the same as a run with that one, in training, evaluation and cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.schema import RunConfig
from opd_ds.data import PromptSet
from opd_ds.engine import Group
from opd_ds.errors import UserError
from opd_ds.evaluation.pictures import Painter, items
from opd_ds.runs.encode import encode_prompts
from opd_ds.runs.setup import prepare
from opd_ds.testing import family_checks as checks
from tests.tiny import PROMPTS, run_settings

WORSE = "the number 5"
Written = Callable[..., str]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """The path of a set of the tiny prompts, with their negative prompts where these are not "-"."""

    def write(*negatives: str | None) -> str:
        file = tmp_path / f"{abs(hash(negatives))}.jsonl"
        rows = [
            {"prompt": prompt} | ({} if negative == "-" else {"negative_prompt": negative})
            for prompt, negative in zip(PROMPTS, negatives or ["-"] * len(PROMPTS), strict=True)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "wan"])
@torch.no_grad()
def test_each_prompt_is_guided_away_from_its_own(tmp_path: Path, name: str) -> None:
    """In one call of two, and with masks."""
    settings = {"frames": 5, "height": 32, "width": 32} if name == "wan" else {}
    folder = import_module(f"opd_ds.testing.tiny.{name}").write(tmp_path)
    family = checks.build(name, folder, **settings)
    network, x, sigma = family.load_transformer(), checks.noise(family).draw(slice(None)), torch.full((4,), 0.6)
    prompts, negatives = checks.PROMPTS, ["", "a green 7", checks.PROMPTS[1], ""]
    together = family.guided_velocity(network, x, sigma, family.encode(prompts), family.encode(negatives), 3.0)
    for row, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        own = slice(row, row + 1)
        alone = family.guided_velocity(
            network, x[own], sigma[own], family.encode([prompt]), family.encode([negative]), 3.0
        )
        checks.close(together[own], alone)


@pytest.mark.parametrize("mode", ["buffered", "fused"])
def test_a_round_is_that_of_a_run_with_this_negative_prompt(
    tiny_world: Path, tmp_path: Path, group: Group, written: Written, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunConfig, "shows_rollouts", lambda self, index: True)

    def first_round(prompts: str, **changes: Any) -> Any:
        both = {f"tasks__{task}__prompts": prompts for task in ("one", "two")}
        settings = run_settings(tiny_world, tmp_path / "out", rollout__mode=mode, **both, **changes)
        return prepare(DistilConfig.model_validate(settings), group).trainer.run_round(0)

    own = first_round(written(*[WORSE] * 5), model__negative_prompt="unread")
    of_model = first_round(written(), model__negative_prompt=WORSE)
    none = first_round(written())
    assert own.losses.loss == pytest.approx(of_model.losses.loss, rel=1e-6)
    assert own.losses.loss != pytest.approx(none.losses.loss, rel=1e-3)
    for task in ("one", "two"):
        torch.testing.assert_close(own.rolled[task].final, of_model.rolled[task].final)
    some = first_round(written("-", WORSE, "", None, WORSE), model__negative_prompt="a green 7")
    finals = {WORSE: of_model, "": none}
    finals["a green 7"] = first_round(written(), model__negative_prompt="a green 7")
    for prompt, latents, metadata, row in zip(
        some.rolled["one"].prompts, some.rolled["one"].final, some.rolled["one"].metadata, range(4), strict=True
    ):
        expected = metadata.get("negative_prompt")
        assert of_model.rolled["one"].prompts[row] == prompt
        torch.testing.assert_close(
            latents, finals["a green 7" if expected is None else expected].rolled["one"].final[row]
        )


def test_images_and_caches_know_them(tiny_world: Path, tmp_path: Path, group: Group, written: Written) -> None:
    prompts = written(WORSE, "-", "a mist", "-", "-")
    settings = run_settings(tiny_world, tmp_path / "out", tasks__one__eval_prompts=prompts)
    config = DistilConfig.model_validate(settings)
    parts = prepare(config, group)
    shown = parts.evaluator.draw(parts.student.module, {"one": 3.0}, 3)["one"]
    worse = copy(parts.family)
    worse.negative_prompt = WORSE
    other = Painter(config, worse, group)
    wanted = items(PromptSet.read(Path(written())), 1, 3)
    drawn = [image.tobytes() for _, image, _ in other.draw(parts.student.module, wanted, 3.0)]
    assert [image.tobytes() == theirs for (_, image), theirs in zip(shown, drawn, strict=True)] == [True, False, False]
    painter = Painter(config, parts.family, group)
    assert [painter.recipe(item)["negative_prompt"] for item, _ in shown] == [WORSE, "", "a mist"]
    encode_prompts(config, group)
    cached = config.model_copy(update={"model": config.model.model_copy(update={"text_encoders": "cached"})})
    prepare(cached, group)
    odd = {"eval_prompts": config.tasks["one"].prompts.model_copy(update={"path": written("fog", *["-"] * 4)})}
    tasks = {**cached.tasks, "one": cached.tasks["one"].model_copy(update=odd)}
    with pytest.raises(UserError, match=r"1 of .* prompts are not encoded, the first: 'fog'"):
        prepare(cached.model_copy(update={"tasks": tasks}), group)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "negative_prompt": null}\n{"prompt": "a", "negative_prompt": 3}\n')
    with pytest.raises(UserError, match="line 2: negative_prompt = 3: allowed are texts, or null"):
        PromptSet.read(file)
