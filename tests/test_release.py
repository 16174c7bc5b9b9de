"""Container recipes that belong together."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(text: str) -> list[str]:
    """Shell commands in one line each, without what differs between the two formats."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [re.sub(r"\s+", " ", line).strip() for line in joined.splitlines() if line.strip()]


def test_both_container_recipes_take_the_same_steps() -> None:
    docker = commands((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    apptainer = (ROOT / "apptainer.def").read_text(encoding="utf-8")
    values = dict(line.removeprefix("ARG ").split("=", 1) for line in docker if line.startswith("ARG "))
    runs = [
        line.removeprefix("RUN ").replace("${EXTRAS}", values["EXTRAS"]) for line in docker if line.startswith("RUN")
    ]
    post = commands(re.search(r"%post\n(.*?)\n%", apptainer, re.DOTALL)[1])  # type: ignore[index]
    assert [line for line in post if not line.startswith("PATH=")] == runs
    assert f"From: {values['BASE']}" in apptainer.splitlines()
