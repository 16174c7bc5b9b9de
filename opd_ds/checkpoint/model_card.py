"""What a folder of weights needs before it leaves: a place of its own, and a card that says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from opd_ds import __version__
from opd_ds.errors import UserError
from opd_ds.models.adapter_files import adapter_parts
from opd_ds.models.two_networks import PARTS
from opd_ds.utils.markdown import markdown_table

CARD = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*\Z")
_CACHED = re.compile(r"models--(.+?)--(.+?)/snapshots/")


def refuse_occupied(folder: Path) -> None:
    """Raise UserError unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; give another one")


def base_name(base: str) -> str:
    """The last part of a hub id, a path or `package:<path>`."""
    return base.rstrip("/").split("/")[-1]


def loading_code(
    pipeline_class: str, base: str, folder: Path, form: Literal["full", "lora", "peft"], dtype: str
) -> str:
    """How diffusers loads what lies in `folder`.

    Args:
        base: folder or hub id of the model that a LoRA belongs to.
        form: a pipeline of its own, a LoRA in diffusers' form, a PEFT folder.
        dtype: name in torch.
    """
    where = folder if form == "full" else base
    lines = [
        "import torch",
        f"from diffusers import {pipeline_class}",
        *(["from peft import PeftModel"] if form == "peft" else []),
        "",
        f"pipeline = {pipeline_class}.from_pretrained({json.dumps(str(where))}, dtype=torch.{dtype})",
    ]
    if form == "lora":
        two = {str(one): part != PARTS[0] for part, one in adapter_parts(folder).items()}
        for one, is_second in (two or {str(folder): False}).items():
            second = ", load_into_transformer_2=True" if is_second else ""
            lines.append(f"pipeline.load_lora_weights({json.dumps(one)}{second})")
    if form == "peft":
        lines.append(
            f"pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, {json.dumps(str(folder))})"
        )
    return "\n".join(lines)


def hub_id(name: str, folder: Path | None) -> str | None:
    """The hub repository behind a model's name: it is one itself, or `folder` lies in the cache. Else None."""
    if _HUB_ID.match(name) and not Path(name).exists():
        return name
    cached = _CACHED.search(str(folder))
    return f"{cached[1]}/{cached[2]}" if cached else None


def recorded_license(folder: Path | None) -> dict[str, str]:
    """What the card of the model in `folder` says about its licence; nothing where it says nothing."""
    card = folder / CARD if folder else None
    if card is None or not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        facts = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        facts = None  # somebody else's card: without its licence rather than no export
    if not isinstance(facts, dict) or "license" not in facts:
        return {}
    return {key: str(facts[key]) for key in ("license", "license_name", "license_link") if key in facts}


def model_card(
    title: str,
    summary: str,
    *,
    base: str | None,
    base_folder: Path | None,
    relation: Literal["adapter", "finetune", "merge"],
    tags: Iterable[str],
    sources: Iterable[tuple[str, str, str]],
    settings: Mapping[str, Any],
    code: str,
    results: str = "",
) -> str:
    """The text of a model card, with what the model hub reads at its top.

    Args:
        base: the model it belongs to, None when nobody recorded it; `base_folder` is where it lies, if here.
        relation: to the base, in the hub's words.
        sources: (role, path or hub id, SHA-256) of all it was made from.
        settings: what decided the numbers, shown as YAML.
        code: how it is loaded.
        results: Markdown.
    """
    hub = hub_id(base, base_folder) if base else None
    facts = {
        "library_name": "diffusers",
        **recorded_license(base_folder),
        **({"base_model": hub, "base_model_relation": relation} if hub else {}),
        "tags": ["opd_ds", *tags],
    }
    files = [(role, f"`{path}`", f"`{sha256}`") for role, path, sha256 in sources]
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        summary,
        "",
        "```python",
        code,
        "```",
        "",
        markdown_table(["", "", "SHA-256"], files, text_columns=3).rstrip(),
        *(["", "## Results", "", results.rstrip()] if results else []),
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(dict(settings), sort_keys=False).rstrip(),
        "```",
        "",
        f"Made with opd_ds {__version__}, diffusers {version('diffusers')}, torch {version('torch')}.",
    ]
    return "\n".join(lines) + "\n"
