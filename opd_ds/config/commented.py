"""A config as a YAML file that says what its keys mean."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from opd_ds.config.base import Section
from opd_ds.config.files import recipe_header
from opd_ds.config.loading import load_config
from opd_ds.config.reference import about

_WIDTH = 118  # of comments


def commented_recipe(name: str) -> str:
    """A shipped recipe with all its keys: what it extends is in it, defaults are written out. A file with this text
    loads as the same config.

    Raises:
        UserError: no such recipe.
    """
    config = load_config(name, None, [])
    return "\n".join([*recipe_header(name), "", *_section(config, "", set())]) + "\n"


def _section(section: Section, indent: str, told: set[str]) -> Iterator[str]:
    """The lines of a section. A key is explained where it comes first."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        text = field.description or (about(type(value)) if isinstance(value, Section) else "")
        if text and f"{name}: {text}" not in told:
            told.add(f"{name}: {text}")
            yield from textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, Section) and not isinstance(_short(value), str):
            yield f"{indent}{name}:"
            yield from _section(value, f"{indent}  ", told)
        elif isinstance(value, dict) and any(isinstance(entry, Section) for entry in value.values()):
            yield f"{indent}{name}:"
            for own_name, entry in value.items():
                yield f"{indent}  {own_name}:"
                yield from _section(entry, f"{indent}    ", told)
        elif isinstance(value, tuple) and any(isinstance(entry, Section) for entry in value):
            yield f"{indent}{name}: {_flow([_short(entry) for entry in value])}"
        else:
            yield f"{indent}{name}: {_flow(_short(value) if isinstance(value, Section) else plain[name])}"


def _short(section: Section) -> Any:
    """A section as a text alone if that says all of it, else as a mapping without defaults."""
    text = getattr(section, section.short_key, None)
    if isinstance(text, str) and type(section).model_validate(text) == section:
        return text
    return section.model_dump(mode="json", exclude_defaults=True)


def _flow(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()
