"""The report for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_ds.doctor.findings import Finding, Report

WIDTH = 100
LINES_PER_CELL = 12


def print_report(report: Report) -> None:
    """Columns check, found, problem; 100 characters wide in a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table("check", "found", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    if report.problems:
        table.add_column("problem")
    for column in table.columns[1:]:
        column.overflow = "fold"  # a path that is cut off is of no use
    for finding in report.findings:
        cells = [_cut(finding.what), _found(finding)]
        if report.problems:
            cells.append(Text(finding.problem or "-", style="red" if finding.problem else ""))
        table.add_row(*cells)
    console.print(table)
    console.print(Text(_summary(report)))


def _found(finding: Finding) -> Text:
    return Text(_cut(finding.found).plain, style="" if finding.checked else "dim")


def _cut(text: str) -> Text:
    """A node list can be longer than a screen."""
    lines = text.splitlines()
    left = len(lines) - LINES_PER_CELL
    if left > 1:
        lines = [*lines[:LINES_PER_CELL], f"and {left} more, see --json"]
    return Text("\n".join(lines))


def _summary(report: Report) -> str:
    ranks, nodes = len(report.hosts), len(set(report.hosts))
    where = f"{ranks} rank{'s' * (ranks != 1)} on {nodes} node{'s' * (nodes != 1)}"
    count = len(report.problems)
    unchecked = sum(not finding.checked for finding in report.findings)
    left_out = f", {unchecked} not checked" if unchecked else ""
    return f"{where}: {f'{count} problem' + 's' * (count != 1) if count else 'no problem found'}{left_out}"
