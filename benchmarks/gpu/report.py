"""gpu.md: the parts, then a table of checks for each of them."""

from __future__ import annotations

from typing import Any

_HIDDEN = ("error", "traceback", "ok", "took")


def as_markdown(data: dict[str, Any]) -> str:
    """Everything in gpu.json but the tracebacks."""
    parts = data["parts"]
    lines = [
        f"Size `{data['size']}`, {data['seconds']:.0f} s in all.",
        "",
        "| part | what | result | s |",
        "|---|---|---|---:|",
    ]
    lines += [f"| {name} | {part['what']} | {part['status']} | {part['seconds']:.0f} |" for name, part in parts.items()]
    for name, part in parts.items():
        if part["checks"]:
            lines += ["", f"### {name}", "", *_checks(part["checks"])]
        if "error" in part:
            lines += ["", f"Last lines of `{name}`:", "", "```", *part["error"], "```"]
    return "\n".join(lines) + "\n"


def _checks(checks: dict[str, dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for check in checks.values() for key in check if key not in _HIDDEN))
    lines = [f"| check | result |{''.join(f' {key} |' for key in keys)}", f"|---|---|{'---:|' * len(keys)}"]
    for name, check in checks.items():
        cells = "".join(f" {_cell(check[key]) if key in check else ''} |" for key in keys)
        lines.append(f"| {name} | {_result(check)} |{cells}")
    return lines


def _result(check: dict[str, Any]) -> str:
    if "error" in check:
        return str(check["error"]).replace("|", "/").replace("\n", " ")
    return {True: "ok", False: "**wrong**", None: "measured"}[check.get("ok")]


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/")
