"""Environments, worker, served reward and comparison, with an adapter that needs no library."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from typer.testing import CliRunner

from opd_ds.errors import UserError
from opd_ds.rewards.remote import RemoteReward
from opd_ds.rewards.server import make_app
from opd_ds.rewards.wire import encode_request
from tests.rewards.clip_world import pictures
from tests.rewards.servers import running
from tools.reference_parity import __main__ as cli
from tools.reference_parity import environment, ours
from tools.reference_parity.environment import Environment, Phase, Requirements, build
from tools.reference_parity.parity import Row, compare, draw_pictures, parity
from tools.reference_parity.reward import ReferenceReward

# Called like the library that it imports, which must be no obstacle.
ADAPTER = """
import colorsys, json, os
from pathlib import Path
import numpy as np

def random_weights(path):
    Path(path).write_text(json.dumps({"factor": 2.0, "yiq": colorsys.rgb_to_yiq(1, 1, 1)[0]}))

def load(weights):
    factor = json.loads(Path(weights).read_text())["factor"]
    def run(images, prompts, metadata):
        print("a chatty library")
        if "raise" in prompts:
            raise ArithmeticError("as asked")
        if "die" in prompts:
            os._exit(3)
        items = zip(images, prompts, metadata)
        words = [np.nan if p == "nan" else len(p) + m.get("bonus", 0) for _, p, m in items]
        score = [factor * np.asarray(image).mean() + more for image, more in zip(images, words)]
        return {"score": np.array(score), "first": np.array([np.asarray(i)[0, 0] for i in images])}
    return run
"""


def ours_exactly(
    weights: Path, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    factor = json.loads(weights.read_text())["factor"]
    scores = [factor * np.asarray(image).mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {"score": np.array(scores), "first": np.array([np.asarray(image)[0, 0] for image in images])}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """`colorsys`: its requirements, its adapter, and an environment in which pip only writes down what it was told."""
    here = tmp_path / "reference"
    (here / "requirements").mkdir(parents=True)
    for file in (environment.WORKER, environment.HERE / "torchvision_shim.py"):
        shutil.copy(file, here)
    (here / "colorsys.py").write_text(ADAPTER)
    (here / "requirements" / "colorsys.txt").write_text("# import colorsys wave\none==1\n\n# pip --no-deps\ntwo==2\n")
    monkeypatch.setattr(environment, "REQUIREMENTS", here / "requirements")
    monkeypatch.setattr(environment, "WORKER", here / "worker.py")
    found = Environment("colorsys", tmp_path / "env")

    def make(wanted: Environment) -> None:
        wanted.python.parent.mkdir(parents=True, exist_ok=True)
        log = wanted.folder / "pip.log"
        wanted.python.write_text(
            f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >> {log}; else exec {sys.executable} "$@"; fi\n'
        )
        wanted.python.chmod(0o755)

    monkeypatch.setattr(environment, "_make", make)
    return found


def test_requirements_are_a_pip_file_with_phases() -> None:
    found = Requirements.parse("# why\na==1\n# import a.b c\n\nb<2\n# pip --no-deps --no-build-isolation\nc==3\n")
    assert found.phases == (Phase((), ("a==1", "b<2")), Phase(("--no-deps", "--no-build-isolation"), ("c==3",)))
    assert found.imports == ("a.b", "c")


@pytest.mark.parametrize("name", environment.names())
def test_shipped_requirements_are_exact_and_have_an_adapter(name: str) -> None:
    requirements = Requirements.parse((environment.REQUIREMENTS / f"{name}.txt").read_text())
    wanted = [line for phase in requirements.phases for line in phase.lines]
    assert wanted
    assert all("==" in line or "<" in line for line in wanted), wanted
    source = (environment.HERE / f"{name.replace('-', '_')}.py").read_text()
    assert "def random_weights(path: str)" in source
    assert "def load(weights: str)" in source


def test_an_environment_is_built_once(library: Environment) -> None:
    assert build("colorsys", library.folder) == library
    log = library.folder / "pip.log"
    first = log.read_text().splitlines()
    assert [line.split("-r")[0] for line in first] == ["-m pip install ", "-m pip install --no-deps "]
    assert [Path(line.split()[-1]).read_text() for line in first] == ["one==1\n", "two==2\n"]
    build("colorsys", library.folder)
    assert log.read_text().splitlines() == first
    (environment.REQUIREMENTS / "colorsys.txt").write_text("three==3\n")
    build("colorsys", library.folder)
    assert len(log.read_text().splitlines()) == 3


def test_an_environment_that_does_not_import_is_not_ready(library: Environment) -> None:
    (environment.REQUIREMENTS / "colorsys.txt").write_text("# import no_such_module\n")
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError, match=r"'colorsys': import failed in .* \(exit code 1"):
            build("colorsys", library.folder)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else than an environment"):
        build("hpsv2x", tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_unknown_library() -> None:
    with pytest.raises(UserError, match=r"'hpsv2': unknown; allowed: .*hpsv2x.* Did you mean 'hpsv2x'"):
        build("hpsv2")


def test_parity_with_itself(library: Environment, tmp_path: Path) -> None:
    build("colorsys", library.folder)
    rows = parity(library, ours_exactly)
    assert [row.quantity for row in rows] == ["score", "first"]
    assert [row.difference for row in rows] == [0, 0]
    assert rows[0].deviation > 1
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures()[0].save(folder / "a_red_cat.png")
    (tmp_path / "own.json").write_text('{"factor": 3.0}')
    (row, _) = parity(library, ours_exactly, tmp_path / "own.json", folder)
    assert row.mean == pytest.approx(3 * np.asarray(pictures()[0]).mean() + len("a red cat"))
    with pytest.raises(UserError, match="no images"):
        parity(library, ours_exactly, pictures=tmp_path / "reference")


def test_differences_are_found() -> None:
    a = np.array([1.0, 2.0, 300.0])
    rows = compare({"x": a, "score": a, "gone": a, "longer": a}, {"x": a + 0.25, "score": a, "longer": a[:2], "new": a})
    assert [row.quantity for row in rows] == ["score", "gone", "longer", "new", "x"]
    assert [row.difference for row in rows] == [0, np.inf, np.inf, np.inf, 0.25]
    assert rows[-1].largest == 300
    assert rows[-1].within(1e-3)
    assert not rows[-1].within(1e-4)
    assert not rows[1].within(1e9)
    (lost,) = compare({"score": a}, {"score": a * np.nan})
    assert not lost.within(1e9)
    assert Row("small", 0.5, largest=0.1).within(0.5)


def test_drawn_pictures_differ_and_stay_the_same() -> None:
    first, second = draw_pictures(), draw_pictures()
    assert [np.array_equal(a, b) for a, b in zip(first, second, strict=True)] == [True] * len(first)
    assert len({image.size for image in first}) == len(first)


def test_commands(library: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, [*arguments, "--folder", str(library.folder)])
        return result.exit_code, result.output + str(result.exception or "")

    assert run("env", "colorsys") == (0, f"colorsys: ready in {library.folder}\n")
    assert "--serve PORT and --weights FILE belong together" in run("env", "colorsys", "--serve", "0")[1]
    assert "nothing to compare" in run("parity", "colorsys")[1]
    monkeypatch.setitem(ours.OURS, "colorsys", ours_exactly)
    code, said = run("parity", "colorsys")
    assert (code, "score" in said, "NO" in said) == (0, True, False)

    def slightly_off(*given: Any) -> dict[str, np.ndarray]:
        found = ours_exactly(*given)
        return {**found, "score": found["score"] * 1.001}

    monkeypatch.setitem(ours.OURS, "colorsys", slightly_off)
    code, said = run("parity", "colorsys")
    assert (code, "NO" in said) == (1, True)
    assert run("parity", "colorsys", "--tolerance", "0.01")[0] == 0


def test_our_server_serves_the_library(library: Environment, tmp_path: Path) -> None:
    """In its own environment: NaN is no score, what the library prints is no answer, and its errors end one request."""
    weights = tmp_path / "w.json"
    weights.write_text('{"factor": 2.0}')
    build("colorsys", library.folder)
    first, second = pictures()[:2]
    with closing(ReferenceReward(library, weights)) as reward, running(make_app(reward)) as url:
        served = RemoteReward(url=url)
        assert served.identity() == {
            "served_at": url,
            "engine": "reference library colorsys",
            "weights": "w.json",
            "sha256": "8335f84753534ccaba13655763d9a048f1547a0fbaf26b845aa1f922183ee65b",
        }
        scores = served.score([first, second], ["a", "nan"], [{"bonus": 1}, {}])
        assert scores[0] == pytest.approx(2 * np.asarray(first).mean() + 1 + 1)
        assert scores[1].isnan()
        body = encode_request([first], ["raise"], None)
        answer = requests.post(f"{url}/score", body, timeout=20)
        assert (answer.status_code, answer.json()["error"]) == (
            500,
            "the reward failed: RuntimeError: ArithmeticError: as asked",
        )
        assert served.score([second], ["b"]) == pytest.approx(2 * np.asarray(second).mean() + 1)
        requests.post(f"{url}/score", encode_request([first], ["die"], None), timeout=20)
        gone = requests.post(f"{url}/score", encode_request([first], ["a"], None), timeout=20)
        assert (gone.status_code, "the worker ended with exit code 3" in gone.text) == (500, True)


def test_weights_that_do_not_load_are_said(library: Environment, tmp_path: Path) -> None:
    build("colorsys", library.folder)
    with pytest.raises(UserError, match=r"'colorsys': .*gone was not loaded \(the worker ended with exit code 1, see"):
        ReferenceReward(library, tmp_path / "gone")
