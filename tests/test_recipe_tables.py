"""docs/recipes.md says what the recipes say, and why where that is not what others say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from opd_ds.config.files import parse_yaml, recipe_names
from opd_ds.config.loading import load_config
from opd_ds.config.paths import package_root

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
HEADER = "| setting | theirs | where | ours | why different |"
# What a recipe's text says when its settings are somebody else's.
CLAIM = re.compile(r"paper|author|public|arXiv|Flow-GRPO|DiffusionOPD|GRPO-Guard|DiffusionNFT", re.IGNORECASE)


class Row(NamedTuple):
    key: str
    theirs: str
    where: str
    ours: str
    reason: str


def tables() -> Iterator[tuple[list[str], list[Row]]]:
    """Of each table the recipes that the paragraph before it names, and its rows."""
    blocks = PAGE.read_text(encoding="utf-8").split("\n\n")
    for paragraph, block in pairwise(blocks):
        if block.startswith(HEADER):
            names = [name for name in re.findall(r"`(\w+)`", paragraph) if name in recipe_names()]
            cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.strip().splitlines()[2:]]
            yield names, [Row(cells[0].strip("`"), *cells[1:]) for cells in cells]


def rows_of(recipe: str) -> dict[str, Row]:
    """By key; a later table of the same recipe replaces an earlier one's row."""
    return {row.key: row for names, rows in tables() if recipe in names for row in rows}


def value_of(cell: str) -> Any:
    """What a cell in backticks stands for; NotImplemented of prose, which equals no setting."""
    whole = re.fullmatch(r"`([^`]*)`", cell)
    return parse_yaml(whole[1], str(PAGE)) if whole else NotImplemented


@cache
def resolved(recipe: str) -> dict[str, Any]:
    return load_config(recipe, None, []).model_dump(mode="json")


def setting(recipe: str, key: str) -> Any:
    at: Any = resolved(recipe)
    for part in key.split("."):
        at = at[int(part)] if isinstance(at, list) else at[part]
    return at


def text_of(recipe: str) -> str:
    """The file and those that it extends, comments included."""
    text = (package_root() / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    parent = re.search(r"^extends: (\w+)", text, re.MULTILINE)
    return text + (text_of(parent[1]) if parent else "")


CLAIMING = [name for name in recipe_names() if CLAIM.search(text_of(name)) and not name.startswith("miniature")]


@pytest.mark.parametrize("recipe", CLAIMING)
def test_a_recipe_is_what_its_table_says(recipe: str) -> None:
    rows = rows_of(recipe)
    assert len(rows) > 20
    wrong = {
        key: (setting(recipe, key), row.ours) for key, row in rows.items() if setting(recipe, key) != value_of(row.ours)
    }
    assert not wrong, "what the recipe has, and what docs/recipes.md says"


def test_every_difference_has_its_reason_and_nothing_else_has() -> None:
    rows = [row for _, found in tables() for row in found]
    assert all(row.where for row in rows)
    same = [row for row in rows if value_of(row.theirs) == value_of(row.ours)]
    assert [row for row in same if row.reason] == []
    assert [row for row in rows if row not in same and not row.reason] == []
    assert len(same) > 50


def test_what_a_recipe_sets_itself_is_in_its_table() -> None:
    """Of the sections that decide what is learned."""
    for recipe in CLAIMING:
        given = parse_yaml((package_root() / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"), recipe)
        own = {
            f"{section}.{key}"
            for section in ("rollout", "optimizer", "objective", "teach", "evaluation")
            for key in given.get(section, {})
        } - {"rollout.micro_batch", "evaluation.micro_batch", "evaluation.baselines", "teach.algorithm"}
        missing = {key for key in own if not any(row.startswith(key) for row in rows_of(recipe))}
        assert not missing, recipe


def test_every_table_names_recipes() -> None:
    assert all(names for names, _ in tables())
    assert {name for names, _ in tables() for name in names} == set(CLAIMING)
