"""From recipe, file and `--set` overrides to a checked RunConfig."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from opd_ds.config.algorithms import ALGORITHMS, DistilConfig, TeachConfig
from opd_ds.config.keys import CHOSEN_BY, all_keys, keys_at
from opd_ds.config.paths import package_root
from opd_ds.config.schema import RunConfig
from opd_ds.config.sections import PromptsSection
from opd_ds.errors import UserError, nearest


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; two tasks with one name must not pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UserError(
                    f"{node.start_mark.name}, line {key_node.start_mark.line + 1}: key {key!r} appears twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-4 as a string, which nobody who writes a learning rate expects.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error


def recipe_names() -> list[str]:
    """Recipes shipped with the package; files that begin with an underscore are only parts of recipes."""
    return sorted(path.stem for path in (package_root() / "recipes").glob("[!_]*.yaml"))


def recipe_summaries() -> dict[str, str]:
    """Each recipe with its first comment line."""
    files = {name: package_root() / "recipes" / f"{name}.yaml" for name in recipe_names()}
    return {name: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, file in files.items()}


def load_config(recipe: str | None, file: Path | None, overrides: list[str]) -> RunConfig:
    """The run config from a shipped recipe or a YAML file, then `key.path=value` overrides (values are YAML).

    With a section `teach` it is a `TeachConfig`, else a `DistilConfig`. A file may begin from another one with
    `extends: NAME`, a file beside it without its ending: sections are merged, values replaced.

    Raises:
        UserError: one line per problem, each with key, value, what is allowed and the nearest valid key.
    """
    if (recipe is None) == (file is None):
        raise UserError("give either --recipe NAME or --config FILE")
    if recipe is not None:
        if recipe not in recipe_names():
            allowed = recipe_names()
            raise UserError(f"recipe {recipe!r}: unknown; allowed: {', '.join(allowed)}.{nearest(recipe, allowed)}")
        file = package_root() / "recipes" / f"{recipe}.yaml"
    assert file is not None
    data = _read_config_file(file)
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
        raise UserError("\n".join(_explain(kind, problem) for problem in error.errors())) from error


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
        raise UserError("\n".join(_explain(PromptsSection, problem) for problem in error.errors())) from error


def _read_config_file(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"config file {file} does not exist")
    if file in seen:
        raise UserError(f"config file {file} extends itself, by way of {seen[-1].name}")
    data = _parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(data, dict):
        raise UserError(f"config file {file}: needs a mapping of sections at the top level")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    return _merged(_read_config_file(file.parent / f"{parent}.yaml", (*seen, file)), data)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {override!r}: expected key.path=value, for example --set rollout.steps=20")
    node = data
    for depth, part in enumerate(parts[:-1]):
        child = node.setdefault(part, {})
        if isinstance(child, str) and part in ("teacher", "prompts", "eval_prompts"):  # given as a bare path
            child = node[part] = {"path": child}
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
        node = child
    value = _parse_yaml(text, f"--set {key}")
    # A bare path for a teacher replaces its path and keeps its guidance and placement.
    if parts[-1] == "teacher" and isinstance(value, str) and isinstance(node.get("teacher"), dict):
        node, parts = node["teacher"], ["path"]
    node[parts[-1]] = value


def _explain(kind: type[BaseModel], problem: Any) -> str:
    # A union's error names the chosen branch, which is no key.
    location = [
        str(part) for place, part in enumerate(problem["loc"]) if place != 1 or problem["loc"][0] not in CHOSEN_BY
    ]
    key = ".".join(location)
    value = problem["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
    if problem["type"] == "extra_forbidden":
        fields = keys_at(kind, location[:-1], problem["loc"])
        similar = nearest(location[-1], fields) or nearest(key, all_keys(kind))
        return f"{key}{shown}: unknown key; allowed here: {', '.join(fields)}.{similar}"
    if problem["type"] == "missing":
        return f"{key}: required and missing; add it to the config or give --set {key}=..."
    if problem["type"].startswith("union_tag"):
        chosen = CHOSEN_BY[key]
        found = value.get(chosen) if isinstance(value, dict) else value
        allowed = problem.get("ctx", {}).get("expected_tags", "").replace("'", "") or ", ".join(
            name for name, section in ALGORITHMS.items() if chosen in section.model_fields
        )
        return f"{key}.{chosen} = {found!r}: allowed are {allowed}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}{shown}: {message}" if key else message
