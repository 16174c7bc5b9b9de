"""The page of all keys and the schema for editors say what the config accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from opd_ds.cli.main import app
from opd_ds.config.algorithms import ALGORITHMS, DistilConfig, TeachConfig
from opd_ds.config.keys import places, sections_of
from opd_ds.config.paths import package_root
from opd_ds.config.reference import PAGE_COMMAND, editor_schema, reference

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["config", "reference"]).output
    assert printed == reference()
    assert PAGE.read_text(encoding="utf-8") == printed, f"keys have changed; run: {PAGE_COMMAND}"


@pytest.mark.parametrize("kind", [DistilConfig, TeachConfig])
def test_every_key_and_section_says_what_it_means(kind: type[DistilConfig | TeachConfig]) -> None:
    found = list(places(kind))
    assert len(found) > 15
    chosen = {"method", "algorithm"}
    silent = {
        f"{place.key}.{name}"
        for place in found
        for name, field in place.section.model_fields.items()
        if not field.description and not sections_of(field.annotation) and name not in chosen
    }
    assert not silent, "these need a description"
    assert not [place.key for place in found if not place.section.__dict__.get("__doc__")], "these need a docstring"


def test_the_page_has_every_algorithm_and_bound() -> None:
    page = reference()
    for name in ALGORITHMS:
        assert page.count(f": {name}\n") == 1
    assert "| `decay` | number >= 0, &lt; 1 | `0.9` |" in page
    assert "| `micro_batch` | integer > 0 or `auto` |  |" in page
    assert "| `rounds` | integer > 0, &lt;= 1e+07 | required |" in page


@pytest.mark.parametrize("file", sorted((package_root() / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_schema_accepts_recipes_and_parts_of_recipes(file: Path) -> None:
    Draft202012Validator(editor_schema()).validate(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        ({"tasks": {"a": {"teacher": "lora", "prompts": "x.txt", "rewards": ["ocr", {"name": "ocr"}]}}}, True),
        ({"extends": "mopd_sd35m", "tasks": {"a": None}}, True),
        ({"teach": {"kl": 0.1}}, True),
        ({"rollout": {"kernel": "eular"}}, False),
        ({"rollout": {"stepps": 3}}, False),
        ({"rollout": {"steps": 0}}, False),
        ({"teach": {"algorithm": "nft", "window": 2}}, False),
        ({"objective": {"method": "nft"}}, False),
        ({"tasks": {"a": {"teacher": {"pth": "lora"}}}}, False),
        ({"tasks": {"a": 3}}, False),
    ],
)
def test_the_schema_knows_right_from_wrong(data: dict[str, Any], valid: bool) -> None:
    assert Draft202012Validator(editor_schema()).is_valid(data) == valid


def test_the_schema_is_one_itself() -> None:
    Draft202012Validator.check_schema(editor_schema())
    assert CliRunner().invoke(app, ["config", "schema"]).output.startswith("{")
