"""What the docs point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#L(\d+))?\)")


def line_of(name: str, file: Path) -> int:
    """Where a class, function or constant is defined; of `Class.method` the method in the class."""
    lines = file.read_text(encoding="utf-8").splitlines()
    at = 0
    for part in name.split("."):
        start = re.compile(rf"\s*(class|def|async def) {part}\b|{part}\b[^=]*=")
        at = next(number for number, line in enumerate(lines[at:], at + 1) if start.match(line))
    return at


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for text, target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: [{text}]({target})"


def test_the_tours_lines_are_those_of_the_code() -> None:
    page = ROOT / "docs" / "tour.md"
    found = [match for match in LINK.findall(page.read_text(encoding="utf-8")) if match[2]]
    assert len(found) > 20
    wrong = {
        f"{target}#L{number}": line_of(text.strip("`"), page.parent / target)
        for text, target, number in found
        if int(number) != line_of(text.strip("`"), page.parent / target)
    }
    assert not wrong, f"lines that moved, and where they are: {wrong}"
