"""Prompts as people have them: what a later stage could not take is refused where it is read, with its place, by
`opd-ds data check` and by the reader of a run alike.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.cluster.world import World
from opd_ds.config.algorithms import DistilConfig
from opd_ds.config.loading import parse_config
from opd_ds.config.paths import find_local, resolve_ds_config
from opd_ds.config.sections import PromptsSection
from opd_ds.data import PromptSet
from opd_ds.errors import UserError
from opd_ds.runs.files import find_files
from tests.tiny import run_settings

HEAVY_NESTING = "[" * 100_000 + "]" * 100_000
LINES: dict[str, tuple[str, str]] = {
    "lone surrogate": (r'{"prompt": "a \ud83d"}', r"holds '\\ud83d', one half of a character"),
    "lone surrogate beside": (r'{"prompt": "a", "tag": "\udc00"}', r"holds '\\udc00'"),
    "lone surrogate in a key": (r'{"prompt": "a", "x": {"\ud83d": 1}}', r"holds '\\ud83d'"),
    "NUL": (r'{"prompt": "a \u0000"}', "the prompt holds a NUL character"),
    "invisible": (r'{"prompt": "\u200b\ufeff \u2028"}', "needs a non-empty text under 'prompt'"),
    "empty": ('{"prompt": ""}', "needs a non-empty text"),
    "number": ('{"prompt": 3}', "needs a non-empty text"),
    "list": ('{"prompt": ["a"]}', "needs a non-empty text"),
    "null": ('{"prompt": null, "caption": "a"}', "needs a non-empty text under 'prompt'; texts are under 'caption'"),
    "key twice": ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands there 2 times"),
    "key twice inside": ('{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' stands there 2 times"),
    "NaN": ('{"prompt": "a", "x": NaN}', r"not JSON \(NaN is no number; write null\)"),
    "infinite": ('{"prompt": "a", "x": -Infinity}', "-Infinity is no number"),
    "too large": ('{"prompt": "a", "x": 1e999}', "1e999 is no number"),
    "too many digits": (f'{{"prompt": "a", "x": {"9" * 5000}}}', r"not JSON \(Exceeds the limit"),
    "nested too deeply": (f'{{"prompt": "a", "x": {HEAVY_NESTING}}}', "nested too deeply"),
    "no object": ('"a"', "needs an object"),
    "a name of a thousand": (json.dumps({"x" * 1000: "a"}), "texts are under 'xxx.* ... xxx"),
}


def checked(path: Path | str) -> str:
    """What `opd-ds data check` prints of a set with problems."""
    outcome = CliRunner().invoke(app, ["data", "check", str(path)])
    assert outcome.exit_code == 1
    assert isinstance(outcome.exception, SystemExit)
    return outcome.output


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_no_later_stage_can_take(case: str, tmp_path: Path) -> None:
    line, message = LINES[case]
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=message) as caught:
        PromptSet.read(file)
    assert str(caught.value).startswith(f"prompts: prompt file {file}, line 2: ")
    assert len(str(caught.value)) < 350
    assert str(caught.value).partition(", line 2: ")[2] in checked(file)


def test_what_a_line_may_hold(tmp_path: Path) -> None:
    """Both halves of a character, a long number, nesting, line separators, control characters, a very long prompt."""
    file = tmp_path / "a.jsonl"
    prompts = ["a \N{GRINNING FACE}", "a\tb\nc\x1b[0m", "a\u2028b\x85c", "long " * 20_000]
    rows = [{"prompt": prompt, "x": 10**30, "y": [{"z": [None, {}]}]} for prompt in prompts]
    file.write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    read = PromptSet.read(file)
    assert read.prompts == tuple(prompt.strip() for prompt in prompts)
    assert read.metadata[0] == {"x": 10**30, "y": [{"z": [None, {}]}]}
    outcome = CliRunner().invoke(app, ["data", "check", str(file)])
    assert outcome.exit_code == 0
    assert "longest       99999 characters, line 4" in outcome.output
    assert len(outcome.output) < 500


def test_spaces_around_a_prompt_make_no_other_prompt(tmp_path: Path) -> None:
    texts = ["a cat", "a cat ", "\ta cat"]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    (tmp_path / "p.csv").write_text("\n".join(["prompt", *(f'"{text}"' for text in texts)]))
    for name in ("p.txt", "p.jsonl", "p.csv"):
        found = PromptSet.read(PromptsSection(path=str(tmp_path / name)), "prompts")
        assert (list(found.prompts), found.repeats) == (["a cat"] * 3, 2)
        once = PromptSet.read(PromptsSection(path=str(tmp_path / name), unique=True), "prompts")
        assert list(once.prompts) == ["a cat"]


def test_files_that_were_put_together(tmp_path: Path) -> None:
    """Each part brought its byte-order mark and its line ends; lines without anything to see are blank."""
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffone\r\n\ufefftwo\n\u200b\n\ufeff\n \u00a0\n\ufeffthree".encode())
    assert PromptSet.read(text).prompts == ("one", "two", "three")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "line 1: not UTF-8"),
    "Latin-1 further down": ("a.txt", b"good\n" * 9 + b"caf\xe9\n", "line 10: not UTF-8"),
    "compressed": ("a.jsonl", gzip.compress(b'{"prompt": "a"}\n'), "line 1: not UTF-8"),
    "compressed by name": ("a.jsonl.gz", b"", "allowed are files that end in .txt, .jsonl, .parquet, .csv"),
    "nothing": ("a.csv", b"", "has no prompts"),
    "a head alone": ("a.csv", b"prompt,tag\n", "has no prompts"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", "line 1: .*the column 'prompt' stands there 2 times"),
    "semicolons": ("a.csv", b"prompt;tag\na;b\n", "line 2: needs a non-empty text .* under 'prompt;tag'"),
    "an open quote": ("a.csv", b'prompt\n"a\nb\n', "not CSV"),
    "a git-lfs pointer": ("a.txt", LFS_POINTER, "a.txt: a git-lfs pointer, .*run `git lfs pull`"),
    "a git-lfs pointer to a table": ("a.parquet", LFS_POINTER, "a.parquet: a git-lfs pointer"),
    "a web page": ("a.txt", b"\n<!DOCTYPE html>\n<html>404</html>\n", "a.txt: a web page; .*download it again"),
    "an empty table": ("a.parquet", b"", "not readable as parquet"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_another_form(case: str, tmp_path: Path) -> None:
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        PromptSet.read(PromptsSection(path=str(tmp_path / name)), "prompts")


NO_SOURCES = {
    "~nobody_of_this_name/a.txt": "Could not determine home directory",
    "a sentence instead of a file " * 20: "File name too long",
    "a\0.txt": "embedded null",
    "": "is empty; give a path",
    " ": "is empty; give a path",
    "/dev/zero": "is a pipe or a device",
    "pipe.jsonl": "is a pipe or a device",
    "circle.txt": "Too many levels of symbolic links",
    "dangling.txt": "no such file",
    "folder.jsonl": "is a folder",
    "folder.jsonl/a.txt": "no such file",
}


@pytest.mark.parametrize("name", NO_SOURCES)
def test_names_that_are_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them hangs, and none is taken for the working folder."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    Path("circle.txt").symlink_to("circle.txt")
    Path("dangling.txt").symlink_to("nowhere.txt")
    Path("folder.jsonl").mkdir()
    with pytest.raises(UserError, match=NO_SOURCES[name]) as caught:
        PromptSet.read(PromptsSection(path=name), "tasks.one.prompts")
    assert str(caught.value).startswith("tasks.one.prompts = ")
    assert len(str(caught.value)) < 250


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a\n")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
        PromptSet.read(tmp_path / "a.txt")
    assert "all of it: cannot be read: Permission denied" in checked(tmp_path / "a.txt")


ODD_NAMES = ["a[1]", "a*", "a?", "a b%20", "~", "größe 漢字", "a::b", "-x", "{a,b}"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv", "parquet"])
def test_a_name_is_no_pattern(name: str, ending: str, tmp_path: Path) -> None:
    """Of two files the named one is read, whichever the name would match."""
    for folder, prompt in ((tmp_path / "a1bb", "other"), (tmp_path / name, "this")):
        folder.mkdir()
        for stem in {name, "a1bb"}:
            file = folder / f"{stem}.{ending}"
            text = prompt if stem == name else "other"
            if ending == "parquet":
                pq.write_table(pa.table({"prompt": [text]}), str(file), filesystem=pa.fs.LocalFileSystem())
            else:
                file.write_text(
                    {"txt": text, "jsonl": json.dumps({"prompt": text}), "csv": f"prompt\n{text}\n"}[ending]
                )
    assert PromptSet.read(tmp_path / name / f"{name}.{ending}").prompts == ("this",)


def test_folders_whose_names_are_patterns(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "this"}\n')
        section = PromptsSection(path=str(tmp_path / name), streaming=True, split="train")
        if any(sign in name for sign in ("[", "*", "?", "::")):
            with pytest.raises(UserError, match=r"in the name of a folder for a pattern; rename it"):
                PromptSet.read(section)
        else:
            assert PromptSet.read(section).prompts == ("this",), name


def test_tables(tmp_path: Path) -> None:
    """Nulls are no prompts, dictionaries are texts, and bytes stay out wherever they stand."""
    file = tmp_path / "a.parquet"
    picture = {"bytes": b"\x89PNG", "path": "a.png"}
    columns = {
        "prompt": pa.array(["a", "b", "a"]).dictionary_encode(),
        "tag": pa.array(["x", None, "y"], pa.large_string()),
        "picture": [picture] * 3,
        "pictures": [[picture]] * 3,
    }
    pq.write_table(pa.table(columns), file)
    read = PromptSet.read(file)
    assert read.prompts == ("a", "b", "a")
    assert read.metadata == ({"tag": "x"}, {"tag": None}, {"tag": "y"})
    assert read == PromptSet.read(file)
    for table, message in (
        (pa.table({"prompt": ["a", None]}), "row 2: needs a non-empty text"),
        (pa.table({"prompt": [b"a"]}), "row 1: needs a non-empty text"),
        (pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "the column 'prompt' stands there 2 times"),
        (pa.table({"prompt": pa.array([], pa.string())}), "has no prompts"),
    ):
        pq.write_table(table, file)
        with pytest.raises(UserError, match=message):
            PromptSet.read(file)
    file.write_bytes(file.read_bytes()[:-40] + file.read_bytes()[-8:])
    with pytest.raises(UserError, match="not readable as parquet"):
        PromptSet.read(file)


def test_a_run_says_that_prompts_are_too_long_and_repeated(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("eleven words " * 5 + "!\n" + "ten words " * 5 + "\n" + "ten words " * 5)
    data = run_settings(tiny_world, tmp_path / "out", model__max_text_length=10)
    data["tasks"] = {"one": data["tasks"]["one"] | {"prompts": str(file)}}
    with caplog.at_level(logging.WARNING, "opd_ds"):
        find_files(DistilConfig.model_validate(data), World())
    assert [record.message for record in caplog.records] == [
        "tasks.one.prompts: 1 of 3 prompts stand further up already and are drawn as often as they stand there; "
        "`unique: true` keeps the first of each",
        "tasks.one.prompts: 1 of 3 prompts have more words than the text encoder takes tokens, 10 "
        "(model.max_text_length); their ends are cut off",
    ]


def test_quote_marks_that_stand_alone_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text('A 27" monitor that shows "HELLO"\nA sign that says "OPEN"\nA sign that says "CLOSED\n')
    outcome = CliRunner().invoke(app, ["data", "check", str(file)])
    assert outcome.exit_code == 0
    assert "quoted text   2 that the reward `ocr` can score" in outcome.output
    assert "odd quotes    2 with quote marks that stand alone, as inch signs do" in outcome.output
    assert "line 1: 'A 27\" monitor that shows \"HELLO\"': `ocr` looks for 'hello'" in outcome.output


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "include as a text": (
        {"tag": "counting", "include": '[{"class": "cat"}]'},
        "include = .*; allowed: a list of objects",
    ),
    "include as a number": ({"tag": "counting", "include": 3}, "include = 3; allowed: a list of objects"),
    "clauses as texts": ({"tag": "counting", "include": ["cat"]}, "include = .*; allowed: a list of objects"),
    "exclude as a number": (
        {"tag": "counting", "include": [{"class": "cat", "count": 1}], "exclude": 2},
        "exclude = 2; allowed: a list of objects",
    ),
    "a class of nobody": (
        {"tag": "counting", "include": [{"class": "cats", "count": 1}]},
        "class = 'cats'; allowed: the 80 names of GenEval. Did you mean 'cat'?",
    ),
    "true as a count": ({"tag": "counting", "include": [{"class": "cat", "count": True}]}, "count = True"),
    "a list as a tag": ({"tag": ["counting"], "include": [{}]}, r"tag = \['counting'\]; allowed"),
    "a list as text": ({"text": ["HELLO"]}, r"text = \['HELLO'\]: the reward `ocr` needs a text"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_no_reward_can_read(case: str, tmp_path: Path) -> None:
    metadata, message = METADATA[case]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", **metadata}))
    assert re.search(message, checked(tmp_path / "a.jsonl"))


def test_a_shipped_ds_config_does_not_stand_in_for_a_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_ds_config("ds_configs/zero3.json", "deepspeed") == resolve_ds_config("zero3", "deepspeed")
    with pytest.raises(UserError, match=r"deepspeed = 'my/zero3\.json': no such file in .*; shipped are"):
        resolve_ds_config("my/zero3.json", "deepspeed")


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    assert find_local("~/x/", "key") == tmp_path / "x"
    assert find_local("~/y", "key") is None


def test_folders_that_are_written_to(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder named `~` or `$SCRATCH` appears where the run was started."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = run_settings(tiny_world, tmp_path / "out", run__output_dir="~/runs", model__text_cache="~/texts")
    config = DistilConfig.model_validate(data)
    assert (config.run.output_dir, config.text_cache) == (tmp_path / "runs", tmp_path / "texts")
    for value, message in (
        ("$SCRATCH/runs", "variables are not replaced"),
        ("~nobody_of_this_name/x", "home directory"),
    ):
        with pytest.raises(UserError, match=rf"run\.output_dir = .*{message}"):
            parse_config(run_settings(tiny_world, tmp_path / "out", run__output_dir=value))
