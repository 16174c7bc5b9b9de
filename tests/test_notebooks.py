"""The notebooks of docs/notebooks/ run from top to bottom, and are stored as a reader should see them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"

# What a notebook shows, in its own names, as a last cell.
SHOWN = {
    "one_round_by_hand": "assert sum(losses[-4:]) < sum(losses[:4]) / 2",
    "three_loras_to_one": """
import json

models = json.loads((folder / "run" / "summary.json").read_text())["models"]
for task in recipe.tasks:  # each LoRA is better at its task than the base, as its full teacher is
    assert min(mean(f"teacher:{task}", task), mean(f"full-{task}", task)) > mean("base", task)
assert len(losses) == config.run.rounds
assert all(0 < models["student"][task] < 1 for task in recipe.tasks)  # so few rounds do not lift every task
""",
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def test_all_notebooks_are_tested() -> None:
    assert {file.stem for file in NOTEBOOKS.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_is_stored_with_what_it_shows(name: str) -> None:
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 300_000
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(SHOWN[name]))  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
