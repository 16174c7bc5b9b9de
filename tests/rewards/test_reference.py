"""Environments, runner and comparison, with an adapter that needs no library."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from opd_ds.errors import UserError
from tests.rewards.clip_world import pictures
from tools.reference_parity import __main__ as cli
from tools.reference_parity import environment, ours, runner
from tools.reference_parity.environment import Environment, Phase, Requirements, build
from tools.reference_parity.parity import Row, compare, draw_pictures, parity

# Called like the library that it imports, which must be no obstacle.
ADAPTER = """
import colorsys, json
from pathlib import Path
import numpy as np

def random_weights(path):
    Path(path).write_text(json.dumps({"factor": 2.0, "yiq": colorsys.rgb_to_yiq(1, 1, 1)[0]}))

def load(weights):
    factor = json.loads(Path(weights).read_text())["factor"]
    def run(images, prompts, metadata):
        score = [factor * np.asarray(image).mean() + len(prompt) for image, prompt in zip(images, prompts)]
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
    for file in (runner.__file__, str(runner.HERE / "torchvision_shim.py")):
        shutil.copy(file, here)
    (here / "colorsys.py").write_text(ADAPTER)
    (here / "requirements" / "colorsys.txt").write_text("# import colorsys wave\none==1\n\n# pip --no-deps\ntwo==2\n")
    monkeypatch.setattr(environment, "REQUIREMENTS", here / "requirements")
    monkeypatch.setattr(environment, "RUNNER", here / "runner.py")
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
    with pytest.raises(UserError, match="no pictures"):
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


Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """A served library: the score is the width, NaN for `nan`; it raises for `raise`."""

    def score(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        if "raise" in prompts:
            raise ArithmeticError("as asked")
        items = zip(images, prompts, metadata, strict=True)
        return {"score": np.array([np.nan if p == "nan" else i.width + m.get("bonus", 0) for i, p, m in items])}

    server = runner.make_server("colorsys", score, {"engine": "fake"}, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def request(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, {key.replace("_", "-"): value for key, value in headers.items()})
        reply = connection.getresponse()
        answer = reply.status, json.loads(reply.read())
        connection.close()
        return answer

    yield request
    server.shutdown()
    thread.join()
    server.server_close()


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_served_library_speaks_the_protocol(ask: Ask) -> None:
    assert ask("GET", "/health") == (200, {"status": "ok"})
    assert ask("GET", "/info") == (200, {"name": "colorsys", "identity": {"engine": "fake"}})
    two = [png(pictures()[0]), png(pictures()[1])]
    assert ask("POST", "/score", {"images": two, "prompts": ["a", "nan"]}) == (200, {"scores": [48.0, None]})
    metadata = [{"bonus": 1}, {}]
    body = {"images": two, "prompts": ["a", "b"], "metadata": metadata}
    assert ask("POST", "/score", body) == (200, {"scores": [49.0, 33.0]})
    assert ask("POST", "/score", {"images": [], "prompts": []}) == (200, {"scores": []})


def test_a_served_library_refuses_and_stays(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    one = png(pictures()[0])
    whole = base64.b64decode(one)
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    jpeg = io.BytesIO()
    pictures()[0].save(jpeg, format="JPEG")
    malformed: list[Any] = [
        b"no json",
        [],
        {"images": [one]},
        {"images": [one], "prompts": []},
        {"images": [one], "prompts": [3]},
        {"images": [one], "prompts": ["a"], "metadata": [3]},
        {"images": ["%"], "prompts": ["a"]},
        {"images": [one], "prompts": "a"},
        {"images": [one], "prompts": {"a": 1}},
        {"images": [None], "prompts": ["a"]},
        {"images": [cut], "prompts": ["a"]},
        {"images": [base64.b64encode(jpeg.getvalue()).decode()], "prompts": ["a"]},
    ]
    assert [ask("POST", "/score", body)[0] for body in malformed] == [400] * len(malformed)
    assert ask("POST", "/elsewhere", {})[0] == 404
    assert ask("GET", "/elsewhere")[0] == 404
    assert ask("POST", "/score", None, Content_Length=str(2**40))[0] == 413
    assert ask("POST", "/score", {"images": [one] * 257, "prompts": ["a"] * 257})[0] == 413
    monkeypatch.setattr(runner, "PIXELS", 48 * 32)
    assert ask("POST", "/score", {"images": [one] * 2, "prompts": ["a"] * 2})[0] == 413
    code, answer = ask("POST", "/score", {"images": [one], "prompts": ["raise"]})
    assert (code, answer) == (500, {"error": "ArithmeticError: as asked"})
    assert ask("POST", "/score", {"images": [one], "prompts": ["a"]}) == (200, {"scores": [48.0]})


def test_identity_of_what_is_served_names_the_weights(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"abc")
    assert runner.identity("hpsv2x", tmp_path / "w.pt") == {
        "engine": "reference library hpsv2x",
        "weights": "w.pt",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
