"""README.md of a bench: tables, claims and images, made from summary.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.paper.methods import Queries
from benchmarks.paper.plan import FULL
from benchmarks.paper.table import SCORED
from opd_ds.utils.markdown import markdown_table

PICTURES = {
    "methods.png": "Mean reward by task; whiskers: standard deviation over seeds",
    "reward_against_passes.png": "Held-out reward along each run; distillation without its teachers",
    "queries.png": "Mean reward by number of queries a trajectory, where they fall, and tasks of an update",
    "noise.png": "The same distillation with states of the ODE and of SDEs",
    "gradient_variance.png": "Total variance of the gradient by step, over rollouts and noise",
}


def as_markdown(summary: dict[str, Any], images: Sequence[str]) -> str:
    """The whole page; `images` stand beside it."""
    claims = [
        f"- **{'holds' if one['holds'] else 'DOES NOT HOLD'}**: {one['claim']}. {_said(one)}"
        for one in summary["claims"]
    ]
    notes = [f"- Left out: {text}" for text in summary["left_out"]]
    if summary["passes_other_than_planned"]:
        names = ", ".join(summary["passes_other_than_planned"])
        notes.append(f"- The budget was made with other passes than were measured: {names}")
    settings = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
    parts = [
        "# Distilling against joint and cascaded learning, in the miniature",
        "Mean reward on held-out prompts, all methods on the same noise, without guidance (± standard deviation over "
        "seeds). *all_tasks*: prompts that ask for all tasks, the product of their rewards. *average*: mean over tasks "
        "of min-max normalised means, over the base and all methods. Budgets are compared in pass units: a "
        "forward pass is 1, a backward pass 2. Seconds are those of rounds, several jobs at a time.",
        _table(summary["methods"]).rstrip(),
        f"Settings: {settings}.",
        *_one_seed(summary["singles"]),
        "## Claims",
        "\n".join([*claims, *notes]),
        "## Images",
        *(f"{PICTURES[name]}:\n\n![{PICTURES[name]}]({name})" for name in images),
    ]
    return "\n\n".join(parts) + "\n"


def _table(methods: dict[str, Any]) -> str:
    rows = []
    for name, found in methods.items():
        average = "-" if found["average"] is None else f"{found['average']:.3f}"
        costs = [f"{found[key]:,.0f}" for key in ("passes", "pass_units", "seconds")]
        rows.append([name, *(_cell(found["tasks"][task]) for task in SCORED), average, *costs])
    return markdown_table(["method", *SCORED, "average", "passes", "pass units", "seconds"], rows)


def _one_seed(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    return [
        "## One seed: where queries fall, and further settings",
        "Students of the first seed with at most the recipe's passes. *mean*: of the three tasks' rewards.",
        _singles(found).rstrip(),
    ]


def _singles(found: dict[str, Any]) -> str:
    """Queries by what they are, further settings by name; the best mean first."""
    by_name = {one.name: one for one in FULL.queries}
    rows = []
    for name, one in sorted(found.items(), key=lambda item: -item[1]["mean_of_tasks"]):
        known = by_name.get(name)
        what = [str(known.count), known.place, known.schedule] if isinstance(known, Queries) else [name, "", ""]
        cells = [_cell(one["tasks"][task]) for task in SCORED]
        rows.append([*what, *cells, f"{one['mean_of_tasks']:.3f}", f"{one['pass_units']:,.0f}"])
    return markdown_table(["queries", "where", "tasks of an update", *SCORED, "mean", "pass units"], rows)


def _cell(found: dict[str, Any]) -> str:
    spread = "" if found["spread"] is None else f" ± {found['spread']:.3f}"
    return f"{found['mean']:.3f}{spread}"


def _said(claim: dict[str, Any]) -> str:
    """`a: x = 1, y = 2; b: 3`, nested mappings in brackets."""
    return "; ".join(f"{name}: {_value(value)}" for name, value in claim["numbers"].items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inner = ((key, f"({_value(one)})" if isinstance(one, dict) else _value(one)) for key, one in value.items())
        return ", ".join(f"{key} {text}" if text.startswith("(") else f"{key} = {text}" for key, text in inner)
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
