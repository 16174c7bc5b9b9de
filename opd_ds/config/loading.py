"""From recipe, file and `--set` overrides to a checked RunConfig."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from opd_ds.config.algorithms import ALGORITHMS, DistilConfig, TeachConfig
from opd_ds.config.files import as_section, merged, parse_yaml, put, read_config_file, read_recipe
from opd_ds.config.keys import CHOSEN_BY, keys_at, similar_key
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import PromptsSection
from opd_ds.errors import UserError, nearest, shown

# The types of a union, as pydantic adds them to the key.
_BRANCH = re.compile(r"^(constrained-|literal\[|tuple\[|(str|bool|int|float)$)")

# What pydantic's kinds of problems ask for, by how they begin.
_ALLOWED = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "finite_number": "a finite number",
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a mapping of names",
    "model_type": "a section with keys",
}


def load_config(recipe: str | None, file: Path | None, overrides: list[str]) -> RunConfig:
    """The run config from a shipped recipe, a YAML file on top of it, or that alone; then `key.path=value` overrides
    (values are YAML).

    With a section `teach` it is a `TeachConfig`, else a `DistilConfig`. docs/config_files.md has the rules.

    Raises:
        UserError: one line per problem, each with key, value, what is allowed and the nearest valid key.
    """
    if recipe is None and file is None:
        raise UserError("give --recipe NAME, --config FILE, or both: the file on top of the recipe")
    data = read_recipe(recipe) if recipe is not None else {}
    if file is not None:
        data = merged(data, read_config_file(file))
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> RunConfig:
    """The checked config.

    Raises:
        UserError: as `load_config`.
    """
    kind = TeachConfig if "teach" in data else DistilConfig
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(_explained(kind, error)) from error


def parse_prompts(path: str, overrides: list[str]) -> PromptsSection:
    """A section for the prompts at `path`, with `key=value` overrides of its other keys.

    Raises:
        UserError: as `load_config`.
    """
    data: dict[str, Any] = {"path": path}
    for override in overrides:
        _apply_override(data, override)
    try:
        return PromptsSection.model_validate(data)
    except ValidationError as error:
        raise UserError(_explained(PromptsSection, error)) from error


def named_prompts(text: str, key: str) -> PromptsSection:
    """The section that `text` stands for, a path alone or a mapping as in a config: `{path: FILE, column: caption}`.

    Raises:
        UserError: as `load_config`; `key` says where it stood.
    """
    data = parse_yaml(text, key) if text.startswith("{") else {"path": text}
    try:
        return PromptsSection.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{key}: {_explained(PromptsSection, error)}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {shown(override)}: expected key.path=value, for example --set rollout.steps=20")
    node = data
    for depth, part in enumerate(parts[:-1]):
        child = as_section(part, node.get(part))
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {shown(override)}: {'.'.join(parts[: depth + 1])} is a value, not a section")
        node[part] = node = child
    put(node, parts[-1], parse_yaml(text, f"--set {key}"))


def _explained(kind: type[BaseModel], error: ValidationError) -> str:
    """One line per key."""
    by_key: dict[str, list[str]] = {}
    for problem in error.errors():
        at, message = _explain(kind, problem)
        others = by_key.setdefault(at, [])
        others.append(message.removeprefix("allowed: ") if others else message)
    return "\n".join(
        f"{at}: {'; or '.join(messages)}" if at else "; ".join(messages) for at, messages in by_key.items()
    )


def _explain(kind: type[BaseModel], problem: Any) -> tuple[str, str]:
    """The key with its value, and what is wrong with it."""
    # A union's error names the chosen branch, which is no key.
    location = [
        str(part) for place, part in enumerate(problem["loc"]) if place != 1 or problem["loc"][0] not in CHOSEN_BY
    ]
    if _BRANCH.search(location[-1] if location else ""):
        location.pop()
    key = ".".join(location)
    value = problem["input"]
    at = key if isinstance(value, dict | BaseModel) or not key else f"{key} = {shown(value)}"
    if problem["type"] == "extra_forbidden":
        if key in DistilConfig.model_fields or key in TeachConfig.model_fields:
            return key, "only for a distillation; the section `teach` makes this a run that learns from rewards"
        fields = keys_at(kind, location[:-1], problem["loc"])
        # A misspelt `teach` looks like a distillation.
        others = list(TeachConfig.model_fields) if len(location) == 1 else []
        similar = similar_key(kind, key, fields + others)
        return at, f"unknown key; allowed here: {', '.join(fields)}.{similar}"
    if value is None and len(location) == 2 and location[0] in ("tasks", "probes"):
        return f"{key} = null", "takes away what a recipe or an extended file has under this name, and there is nothing"
    if problem["type"] == "missing" and location[-1].isdecimal():
        return ".".join(location[:-1]), f"has {location[-1]} entries and needs more"
    if problem["type"] == "missing":
        return key, f"required and missing; add it to the config or give --set {key}=..."
    if problem["type"].startswith("union_tag"):
        chosen = CHOSEN_BY[key]
        found = value.get(chosen) if isinstance(value, dict) else value
        names = [name for name, section in ALGORITHMS.items() if chosen in section.model_fields]
        if isinstance(value, str):
            return f"{key} = {shown(value)}", f"is a section with keys; write {key}.{chosen}: {', '.join(names)}"
        similar = nearest(str(found), names)
        return f"{key}.{chosen} = {shown(found)}", f"allowed are {', '.join(names)}{'.' if similar else ''}{similar}"
    if problem["type"] == "invalid_key":
        what = f"has the key {shown(value)}, which is no text; in {{...}} a comma ends an entry: write 2.0, not 2,0"
        return ".".join(location[:-1]), what
    if problem["type"] == "literal_error":
        names = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        similar = nearest(str(value), names)
        return at, f"allowed: {problem['ctx']['expected'].replace(' or ', ', ')}{'.' if similar else ''}{similar}"
    for kind_of_problem, allowed in _ALLOWED.items():
        if problem["type"].startswith(kind_of_problem):
            return at, f"allowed: {allowed.format(**problem.get('ctx', {}))}"
    return at, problem["msg"].removeprefix("Value error, ")
