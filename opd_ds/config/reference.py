"""The keys of a run config as documents: a page for people, a JSON schema for editors."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from opd_ds.config.algorithms import DistilConfig, TeachConfig
from opd_ds.config.keys import Place, places, sections_of
from opd_ds.utils.markdown import markdown_table

_KINDS = (DistilConfig, TeachConfig)
PAGE_COMMAND = "opd-ds config reference > docs/config.md"
_INTRODUCTION = f"""\
# Every key of a run config

<!-- Written by `{PAGE_COMMAND}` from opd_ds/config/. -->

[config_files.md](config_files.md) says how a config is put together from recipes, files and `--set`, and how an
editor completes and checks these keys. A key is written as its path, as `--set rollout.steps=20` takes it: `NAME` is
a name of your own, `[]` an entry of a list. Unknown keys are errors.

With a section `teach` a config learns from rewards, without one it distils teachers. `objective`, `anchor` and
`tasks.NAME.teacher` belong to distillations only, all other keys to both.
"""


def reference() -> str:
    """The page docs/config.md."""
    by_section: dict[type[BaseModel], list[Place]] = {}
    for kind in _KINDS:
        for place in places(kind):
            known = by_section.setdefault(place.section, [])
            if place not in known:
                known.append(place)
    titles = _titles(by_section)
    parts = [_INTRODUCTION, "## Top level\n", _table(_KINDS, titles)]
    for section, at in by_section.items():
        parts += [f"## {titles[section]}\n", f"{about(section)}\n"]
        if at[1:]:
            parts.append(f"The same keys: {', '.join(f'`{place.key}`' for place in at[1:])}.\n")
        parts.append(_table([section], titles))
    return "\n".join(parts)


def editor_schema() -> dict[str, Any]:
    """A JSON schema of config files. What a file leaves out may be in a recipe, so no key is required."""
    schema = _of_files(_schema())
    for kind in _KINDS:
        keys = schema["$defs"][kind.__name__]["properties"]
        keys["extends"] = {"type": "string", "description": "a file or a shipped recipe whose settings come first"}
        for name in ("tasks", "probes"):
            entry = keys[name]["additionalProperties"]
            keys[name]["additionalProperties"] = {"anyOf": [entry, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "opd-ds run config",
        "anyOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in _KINDS],
        **schema,
    }


@cache
def _schema() -> dict[str, Any]:
    return models_json_schema([(kind, "validation") for kind in _KINDS])[1]


def _of_files(node: Any) -> Any:
    """A part of a section may be a part of several algorithms' sections: `anyOf` where a complete one is `oneOf`."""
    if isinstance(node, list):
        return [_of_files(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key != "required" or not isinstance(value, list)}
    return {"anyOf" if key == "oneOf" else key: _of_files(value) for key, value in kept.items()}


def _titles(by_section: dict[type[BaseModel], list[Place]]) -> dict[type[BaseModel], str]:
    titles: dict[type[BaseModel], str] = {}
    for section, at in by_section.items():
        title = f"{at[0].key} with {at[0].choice}" if at[0].choice else at[0].key
        titles[section] = f"{title} with teach" if title in titles.values() else title
    return titles


def _table(sections: Sequence[type[BaseModel]], titles: dict[type[BaseModel], str]) -> str:
    rows: dict[str, list[list[str]]] = {}
    for section in sections:
        definition = _schema()["$defs"][section.__name__]
        properties = definition.get("anyOf", [definition])[-1]["properties"]  # the first may be the short form
        for name, field in section.model_fields.items():
            below = [f"[{titles[found]}](#{_anchor(titles[found])})" for found in sections_of(field.annotation)]
            allowed = ", ".join(below) or _allowed(properties[name])
            default = "" if below else _written(field.get_default(call_default_factory=True))
            row = [
                f"`{name}`",
                allowed,
                "required" if field.is_required() else default,
                _meaning(field, properties[name]),
            ]
            rows.setdefault(name, []).append([cell.replace("<", "&lt;") for cell in row])
    for first, *others in rows.values():  # `tasks` has other entries in a config with `teach`
        first[1] = ", ".join(dict.fromkeys([first[1], *(other[1] for other in others)]))
    return markdown_table(
        ["key", "allowed", "default", "meaning"], [first for first, *_ in rows.values()], text_columns=4
    )


def about(section: type[BaseModel]) -> str:
    """What a section is: its docstring's first paragraph."""
    paragraph, *_ = inspect.cleandoc(section.__dict__["__doc__"]).split("\n\n")
    return " ".join(paragraph.split())


def _meaning(field: FieldInfo, schema: dict[str, Any]) -> str:
    below = sections_of(field.annotation)
    if field.description or not below:
        return field.description or ("chooses this algorithm" if "const" in schema else "")
    return about(below[0])


def _anchor(title: str) -> str:
    """As GitHub and MkDocs name a heading's anchor."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _written(value: Any) -> str:
    if value in (None, ""):
        return ""
    plain = json.loads(json.dumps(value, default=str))
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


def _allowed(node: dict[str, Any]) -> str:
    """A key's type and bounds, from its JSON schema."""
    if "anyOf" in node:
        choices = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
        return " or ".join(_allowed(choice) for choice in choices)
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind == "array":
        entries = node.get("prefixItems")
        return f"list of {len(entries)} numbers" if entries else f"list of {_allowed(node['items'])}"
    if kind == "object":
        return "mapping of names to values"
    words = {
        "string": node.get("format", "text"),
        "integer": "integer",
        "number": "number",
        "boolean": "`true`, `false`",
    }
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {node[bound]:g}" for bound, sign in signs.items() if bound in node]
    return " ".join([words[str(kind)], ", ".join(bounds)]).strip()
