"""gpu.md: the parts, then a table of checks for each of them."""

from __future__ import annotations

from typing import Any

from opd_ds.utils.markdown import markdown_table

_HIDDEN = ("error", "traceback", "ok", "took")


def as_markdown(data: dict[str, Any]) -> str:
    """Everything in gpu.json but the tracebacks."""
    parts = data["parts"]
    rows = [(name, part["what"], part["status"], f"{part['seconds']:.0f}") for name, part in parts.items()]
    table = markdown_table(["part", "what", "result", "s"], rows, text_columns=3)
    lines = [f"Size `{data['size']}`, {data['seconds']:.0f} s in all.", "", *table.splitlines()]
    for name, part in parts.items():
        if part["checks"]:
            lines += ["", f"### {name}", "", *_checks(part["checks"]).splitlines()]
        if "error" in part:
            lines += ["", f"Last lines of `{name}`:", "", "```", *part["error"], "```"]
    return "\n".join(lines) + "\n"


def _checks(checks: dict[str, dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for check in checks.values() for key in check if key not in _HIDDEN))
    rows = [
        [name, _result(check), *(_cell(check[key]) if key in check else "" for key in keys)]
        for name, check in checks.items()
    ]
    return markdown_table(["check", "result", *keys], rows, text_columns=2)


def _result(check: dict[str, Any]) -> str:
    if "error" in check:
        return str(check["error"]).replace("\n", " ")
    return {True: "ok", False: "**wrong**", None: "measured"}[check.get("ok")]


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
