"""Config files: recipes and the user's own, read and put on top of each other."""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from opd_ds.config.paths import beside, package_root, read_text
from opd_ds.config.sections import OWN_REWARD
from opd_ds.errors import UserError, nearest, shortened, shown

_RECIPES = package_root() / "recipes"
_TEACHERS = ("teacher", "anchor")
# Sections that may be given as a path alone.
_SHORT = (*_TEACHERS, "prompts", "eval_prompts")
# Keys whose text names something to read.
_PATHS = ("path", "start", "deepspeed", *_SHORT)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; two tasks with one name must not pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping as a key", key_node.start_mark)
            if key in seen:
                raise UserError(
                    f"{node.start_mark.name}, line {key_node.start_mark.line + 1}: key {shown(key)} appears twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """No file can be named, and nothing printed, with a NUL or with half a character (a lone surrogate)."""
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        odd = [character for character in text if character == "\0" or "\ud800" <= character <= "\udfff"]
        if odd:
            raise yaml.constructor.ConstructorError(None, None, f"the character {odd[0]!r}", node.start_mark)
        return super().construct_scalar(node)


# YAML 1.1 reads 1e-4 as a string, which nobody who writes a learning rate expects.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, name: str) -> Any:
    """
    Raises:
        UserError: not valid YAML, or a key twice, naming `name` and the line.
    """
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{name}{where}: not valid YAML: {problem}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # a 13th month, a number of 5000 digits; lists in lists in lists
        raise UserError(f"{name}: not valid YAML: {shortened(str(error), 100)}") from error


def recipe_names() -> list[str]:
    """Recipes shipped with the package; files that begin with an underscore are only parts of recipes."""
    return sorted(path.stem for path in (_RECIPES).glob("[!_]*.yaml"))


def recipe_header(name: str) -> list[str]:
    """The comment lines at the beginning of a recipe; the first says what it is."""
    lines = (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))


def read_recipe(name: str) -> dict[str, Any]:
    """A shipped recipe.

    Raises:
        UserError: no such recipe.
    """
    if name not in recipe_names():
        allowed = recipe_names()
        raise UserError(f"recipe {name!r}: unknown; allowed: {', '.join(allowed)}.{nearest(name, allowed)}")
    return read_config_file(_RECIPES / f"{name}.yaml")


def read_config_file(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file on top of what it extends; what its paths name beside the file is named in full.

    Raises:
        UserError: not there, no YAML mapping, or it extends what is not there, or itself.
    """
    if file in seen:
        raise UserError(f"config file {file} extends itself, by way of {seen[-1].name}")
    data = parse_yaml(read_text(file, "config file"), str(file))
    if not isinstance(data, dict):
        raise UserError(f"config file {file}: needs a mapping of sections at the top level")
    parent = data.pop("extends", None)
    if file.parent != _RECIPES:
        data = _named_in_full(data, file.parent, "")
    return data if parent is None else merged(read_config_file(_extended(parent, file), (*seen, file)), data)


def _extended(name: Any, file: Path) -> Path:
    places = [file.parent / f"{name}.yaml", file.parent / str(name), _RECIPES / f"{name}.yaml"]
    # A file that is named like the recipe that it begins from does not mean itself.
    found = [place for place in places if _is_file(place) and (place != file or file.parent == _RECIPES)]
    if not found:
        raise UserError(
            f"{file}: extends = {name!r}: neither a file in {file.parent.absolute()} nor a shipped recipe; shipped are "
            f"{', '.join(recipe_names())}.{nearest(str(name), recipe_names())}"
        )
    return found[0]


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _named_in_full(data: dict[str, Any], folder: Path, at: str) -> dict[str, Any]:
    named = dict(data)
    for key, value in data.items():
        if isinstance(value, dict) and key != "where":  # whose keys are columns
            named[key] = _named_in_full(value, folder, f"{at}{key}.")
        elif isinstance(value, str) and key in _PATHS:
            named[key] = beside(value, folder, f"{at}{key}", only_file=key == "deepspeed")
        elif isinstance(value, list) and key == "rewards":
            named[key] = [_reward_in_full(reward, folder, f"{at}{key}") for reward in value]
    return named


def _reward_in_full(reward: Any, folder: Path, key: str) -> Any:
    """FILE.py:NAME, alone or as the name in a mapping; everything else as it is."""
    if isinstance(reward, dict) and "name" in reward:
        return reward | {"name": _reward_in_full(reward["name"], folder, key)}
    if not isinstance(reward, str) or OWN_REWARD not in reward:
        return reward
    file, _, name = reward.rpartition(":")
    return f"{beside(file, folder, key, only_file=True)}:{name}"


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged and values replaced; null takes away what stands below."""
    result = dict(below)
    for key, value in above.items():
        old = as_section(key, result.get(key))
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value)
        else:
            put(result, key, value)
    return result


def as_section(key: str, value: Any) -> Any:
    """A section that is given as a path alone, as a mapping; everything else as it is."""
    return {"path": value} if isinstance(value, str) and key in _SHORT else value


def put(section: dict[str, Any], key: str, value: Any) -> None:
    """Set a key: null takes it away, a path alone keeps a teacher's other keys."""
    old = section.get(key)
    if key in _TEACHERS and isinstance(value, str) and isinstance(old, dict):
        value = {**old, "path": value}
    if value is None and key in section:
        del section[key]
    else:
        section[key] = value
