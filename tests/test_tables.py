"""Tables at 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from opd_ds.evaluation.tables import print_table
from opd_ds.utils.tables import fitting


def printed(head: list[str], rows: list[list[str]], width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for table in fitting(head, rows, width):
        console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("columns", [1, 4, 12])
def test_no_number_is_cut_and_no_line_too_long(columns: int) -> None:
    head = ["model", *(f"a_task_with_a_long_name_{k} / reward" for k in range(columns))]
    rows = [[f"checkpoint-with-a-long-name-{r}", *(f"{r}.{k:03d} ±0.{k:03d}" for k in range(columns))] for r in (1, 2)]
    lines = printed(head, rows)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert all(cell in text for row in rows for cell in row[1:])
    assert "…" not in text


def test_a_narrow_table_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(fitting(["model", "a", "b"], [["base", "1", "2"]], 80)) == 1
    tasks = {f"task_{k}": {"base": 0.1, "teacher": 0.5, "student": 0.4} for k in range(9)}
    models = {model: dict.fromkeys(tasks, 0.25) for model in ("base", "teacher:task_3", "student")}
    console = Console(file=io.StringIO(), width=80)
    print_table(console, {"tasks": tasks, "models": models}, {})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("gain kept") == text.count("teacher:task_3") > 1
    assert max(map(len, text.splitlines())) <= 80
