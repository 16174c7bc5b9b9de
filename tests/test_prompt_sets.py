"""Prompt sets in the public formats; what is wrong with a file; the sets that are made here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Image, config
from PIL import Image as Pictures
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import load_config, parse_prompts
from opd_ds.config.sections import PromptsSection
from opd_ds.data import PromptSet
from opd_ds.data.generators.compositions import _KINDS, as_lines, compositions
from opd_ds.data.generators.lettering import lettering
from opd_ds.errors import UserError
from opd_ds.rewards.geneval.rules import CLASSES, TAGS, Detection, Task, is_correct, keep, partial_score
from opd_ds.rewards.ocr import normalise, target_text
from tests.tiny import run_settings, write_config

DATA = Path(__file__).parents[1] / "data"


def read(path: Path | str, **chosen: Any) -> PromptSet:
    return PromptSet.read(PromptsSection(path=str(path), **chosen), "tasks.one.prompts")


# ---- reading ----


def test_lines_are_what_universal_newlines_make(tmp_path: Path) -> None:
    """Unicode knows further breaks; in a prompt they are characters."""
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffone\u2028still one\r\n\r\n two\x85 \rthree".encode())
    assert PromptSet.read(text).prompts == ("one\u2028still one", "two", "three")
    rows = tmp_path / "a.jsonl"
    rows.write_bytes("\ufeff".encode() + b'{"prompt": "a\xe2\x80\xa8b"}\n')
    assert PromptSet.read(rows).prompts == ("a\u2028b",)


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One table of two tasks, in each format."""
    records = [
        {"caption": "a cat", "task": "look", "level": 1},
        {"caption": 'a sign, "STOP"', "task": "ocr", "level": 2},
        {"caption": "a cat", "task": "look", "level": 3},
        {"caption": "a dog", "task": "count", "level": 1},
    ]
    file = tmp_path / f"table.{request.param}"
    if request.param == "jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        data = Dataset.from_list(records)
        data.to_csv(file) if request.param == "csv" else data.to_parquet(file)
    return file


def test_rows_of_one_file_go_to_tasks(table: Path) -> None:
    look = read(table, column="caption", where={"task": "look"}, metadata=("task",))
    assert look.prompts == ("a cat", "a cat")
    assert look.metadata == ({"task": "look"},) * 2
    assert look.repeats == 1
    rest = read(table, column="caption", where={"task": ("ocr", "count")})
    assert rest.prompts == ('a sign, "STOP"', "a dog")
    assert [int(row["level"]) for row in rest.metadata] == [2, 1]
    both = read(table, column="caption", where={"task": "look", "level": 3})
    assert both.prompts == ("a cat",)
    assert read(table, column="caption", unique=True).prompts == ("a cat", 'a sign, "STOP"', "a dog")
    assert read(table, column="caption", unique=True, limit=2).prompts == ("a cat", 'a sign, "STOP"')


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "needs a non-empty text under 'prompt'; texts are under 'caption', 'task'"),
        ({"column": "caption", "where": {"tasks": "ocr"}}, "no column 'tasks'; there are .*Did you mean 'task'"),
        ({"column": "caption", "where": {"task": "text"}}, "no row has task = 'text'; task has 'count', 'look', 'ocr'"),
        ({"column": "caption", "metadata": ("tag",)}, "has no 'tag', which `metadata` names"),
        ({"column": "caption", "split": "train"}, r"tasks\.one\.prompts\.split = 'train' is for data sets"),
    ],
)
def test_columns_that_are_not_there(table: Path, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(table, **chosen)
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"o\x00n\x00e\x00\n\x00", "line 1: holds NUL characters"),
        ("a.jsonl", b'{"prompt": "x"}\n["y"]\n', "line 2: needs an object"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": 3}\n', "line 3: needs a non-empty text"),
        ("a.csv", b'prompt,tag\n"a\nb",x\nc\n', "line 4: has not the 2 columns of the first line"),
        ("a.csv", b"prompt,tag\na,b,c\n", "line 2: has not the 2 columns"),
        ("a.csv", b'prompt\n"a\n', "not CSV"),
        ("a.csv", b"prompt\ncaf\xe9\n", "line 2: not UTF-8"),
        ("a.csv", b"prompt\n", "has no prompts"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        PromptSet.read(tmp_path / name)
    assert f"prompt file {tmp_path / name}" in str(caught.value)


def test_what_is_no_prompt_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    for path, message in (
        ("data/none/train.txt", r"tasks\.one\.prompts = 'data/none/train\.txt': no such file"),
        ("./none", "allowed are files that end in .txt, .jsonl, .parquet, .csv, folders"),
        ("a.docx", "allowed are files"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match=r"a\.txt has no columns to choose from"):
        read(tmp_path / "a.txt", column="caption")


@pytest.fixture
def pictures() -> Dataset:
    """Captions beside images, as preference sets are."""
    rows = {"caption": ["a", "b", "a"], "rank": [1, 2, 3], "jpg": [Pictures.new("RGB", (2, 2))] * 3, "raw": [b"x"] * 3}
    return Dataset.from_dict(rows).cast_column("jpg", Image())


@pytest.mark.parametrize("streaming", [True, False])
def test_data_sets_of_the_hub_library(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    for split in ("train", "test"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pictures.select(range(3 if split == "train" else 1)).to_parquet(folder / "data" / f"{split}-0.parquet")
    found = read(folder, column="caption", split="train", streaming=streaming)
    assert found.prompts == ("a", "b", "a")
    assert found.metadata == ({"rank": 1}, {"rank": 2}, {"rank": 3})
    assert read(folder, column="caption", split="train", streaming=streaming, limit=1).prompts == ("a",)
    with pytest.raises(UserError, match=rf"data set {folder}: has the splits 'train', 'test'; choose one with split"):
        read(folder, column="caption", streaming=streaming)
    with pytest.raises(UserError, match=r"not readable as a data set .*dev"):
        read(folder, column="caption", split="dev", streaming=streaming)
    with pytest.raises(UserError, match=rf"data set {folder}, row 1: needs a non-empty text under 'prompt'"):
        read(folder, split="test", streaming=streaming)


def test_data_sets_as_they_are_saved(pictures: Dataset, tmp_path: Path) -> None:
    pictures.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one", column="caption", unique=True).prompts == ("a", "b")
    DatasetDict({"train": pictures, "test": pictures.select([1])}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both", column="caption", split="test").prompts == ("b",)
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        read(tmp_path / "both", column="caption", split="dev")


def test_a_hub_id_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*where: Any, **how: Any) -> Dataset:
        asked.append((where, how))
        return Dataset.from_dict({"prompt": ["x"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read("some-org/some-set", subset="small", split="train", streaming=True).prompts == ("x",)
    assert asked == [(("some-org/some-set", "small"), {"split": "train", "streaming": True})]


def test_prompts_in_a_config(tiny_world: Path, tmp_path: Path) -> None:
    data = run_settings(tiny_world, tmp_path / "out")
    data["tasks"]["one"]["prompts"] = {"path": "x.jsonl", "where": {"task": "ocr"}}
    data["tasks"]["one"]["eval_prompts"] = "y.txt"
    file = write_config(tmp_path / "run.yaml", data)
    settings = load_config(None, file, ["tasks.one.eval_prompts.limit=3", "tasks.one.prompts.where.task=[a, b]"])
    task = settings.tasks["one"]
    assert task.prompts == PromptsSection(path="x.jsonl", where={"task": ("a", "b")})
    assert task.eval_prompts == PromptsSection(path="y.txt", limit=3)
    assert DistilConfig.model_validate(settings.model_dump(mode="json")) == settings
    assert load_config(None, file, ["tasks.one.prompts=z.txt"]).tasks["one"].prompts.where == {}
    with pytest.raises(UserError, match=r"tasks\.one\.prompts\.colum = 'a': unknown key; allowed here: path, column"):
        load_config(None, file, ["tasks.one.prompts.colum=a"])
    with pytest.raises(UserError, match=r"limit = 0: allowed: more than 0"):
        parse_prompts("x.txt", ["limit=0"])


# ---- making ----


def fulfilling(task: Task) -> tuple[list[Detection], dict[str, list[str]]]:
    """Detections that hold exactly what is asked for, and the colours by class."""
    offsets = {None: (0, 0), "left of": (-300, 0), "right of": (300, 0), "above": (0, -300), "below": (0, 300)}
    detections, colours = [], {}
    for clause in task.include:
        dx, dy = offsets[clause.relation]
        for place in range(clause.count):
            left, top = 1000 + dx + 40 * place, 1000 + dy
            detections.append(Detection(clause.label, 0.95, (left, top, left + 30, top + 30)))
        colours[clause.label] = [str(clause.colour)] * clause.count
    return detections, colours


def test_compositions_are_what_the_scorer_reads() -> None:
    entries = compositions(3000, seed=5)
    assert len({entry["prompt"] for entry in entries}) == 3000
    tags, classes = Counter(entry["tag"] for entry in entries), set()
    assert tags["single_object"] == 80  # all there are
    assert tags["counting"] == 231
    assert set(tags) == set(TAGS)
    for entry in entries:
        task = Task.parse(entry)
        assert task is not None
        detections, colours = fulfilling(task)

        def colours_of(label: str, objects: Sequence[Detection], known: dict[str, list[str]] = colours) -> list[str]:
            return known[label][: len(objects)]

        found = keep(detections, task.tag)
        assert is_correct(found, task, colours_of), entry
        assert partial_score(found, task, colours_of) == 1, entry
        fewer = keep(detections[1:], task.tag)
        assert not is_correct(fewer, task, colours_of), entry
        classes |= {clause.label for clause in task.include}
        for clause in task.include:  # and the words ask for it
            assert clause.label.split()[-1][:3] in entry["prompt"] or clause.label in ("person", "computer mouse")
            assert clause.colour is None or clause.colour in entry["prompt"]
            assert clause.relation is None or f" {clause.relation} " in entry["prompt"]
    assert classes == set(CLASSES)


def test_lettering_quotes_one_text() -> None:
    prompts = lettering(500, seed=5)
    assert len(set(prompts)) == 500
    for prompt in prompts:
        text = prompt.split('"')[1]
        assert prompt.count('"') == 2
        assert target_text(prompt, {}) == normalise(text) != ""


def test_the_same_seed_is_the_same_file() -> None:
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16]
               for text in (as_lines(compositions(200, 7)), "\n".join(lettering(200, 7)))]  # fmt: skip
    assert digests == ["7e41a2603a746c32", "0f498c976e4a0b81"]
    assert compositions(50, 7) == compositions(200, 7)[:50]
    assert compositions(50, 8) != compositions(50, 7)
    assert lettering(50, 8) != lettering(50, 7)


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_ds.data.generators.lettering._SIZE", 40)
    few = lettering(40, 0)
    assert len(set(few)) == 40
    with pytest.raises(UserError, match="--count 40: there are only 39 such prompts"):
        lettering(40, 1, without={few[3]})
    monkeypatch.setattr("opd_ds.data.generators.compositions._KINDS", _KINDS[:1])
    with pytest.raises(UserError, match="--count 81: there are only 80 such prompts"):
        compositions(81, 0)


@pytest.mark.parametrize(
    ("kind", "folder", "train", "test"),
    [("geneval", "composition", 600, 120), ("ocr", "lettering", 400, 80)],
)
def test_shipped_sets_are_generated_and_held_out(tmp_path: Path, kind: str, folder: str, train: int, test: int) -> None:
    """By the commands of data/README.md."""
    ending = "_metadata.jsonl" if kind == "geneval" else ".txt"
    names = {part: DATA / folder / f"{part}{ending}" for part in ("train", "test")}
    commands = [line.split() for line in (DATA / "README.md").read_text().splitlines() if f"generate {kind}" in line]
    assert len(commands) == 2
    for command in commands:
        place = command.index("--output") + 1
        shipped = Path(command[place])
        assert shipped == Path("data") / folder / shipped.name
        command[place] = str(tmp_path / shipped.name)
        if "--without" in command:
            command[command.index("--without") + 1] = str(names["test"])
        assert CliRunner().invoke(app, command[1:], catch_exceptions=False).exit_code == 0
        assert (tmp_path / shipped.name).read_bytes() == (DATA / folder / shipped.name).read_bytes()
    sets = {part: PromptSet.read(file) for part, file in names.items()}
    assert (len(sets["train"]), len(sets["test"])) == (train, test)
    assert not set(sets["train"].prompts) & set(sets["test"].prompts)


# ---- looking through ----


def test_check_counts_and_names_problems(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["data", "check", str(DATA / "composition" / "test_metadata.jsonl")])
    assert good.exit_code == 0
    assert "prompts       120\ntags          single_object 20, two_object 20" in good.output
    assert "GenEval       120" in good.output
    assert "problems      none" in good.output

    bad = tmp_path / "bad.jsonl"
    item = {"class": "cat", "count": 1}
    records = [
        json.dumps({"prompt": 'a "sign"', "tag": "text"}),
        "{",
        json.dumps({"prompt": "a cat", "tag": "single_object", "include": [item]}),
        json.dumps({"prompt": "a cat", "tag": "single_object", "include": [item | {"class": "cats"}]}),
        *["[]"] * 9,
    ]
    bad.write_text("\n".join(records))
    found = CliRunner().invoke(app, ["data", "check", str(bad)])
    assert found.exit_code == 1
    assert "prompts       3" in found.output
    assert "repeats       1, the first: line 4: 'a cat'" in found.output
    assert "quoted text   1" in found.output
    assert "line 2: not JSON" in found.output
    assert "line 4: GenEval metadata: class = 'cats'" in found.output
    assert "problems      11" in found.output
    assert "and 6 more" in found.output
    unique = CliRunner().invoke(app, ["data", "check", str(bad), "--set", "unique=true", "--set", "where.tag=text"])
    assert "prompts       1\n" in unique.output
