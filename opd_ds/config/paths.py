"""From names in a config to files: local paths, `package:` paths, hub ids, shipped ds_configs."""

from __future__ import annotations

import re
import stat
from importlib import resources
from pathlib import Path

from opd_ds.errors import UserError, nearest, shown

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(/.+)?$")


def package_root() -> Path:
    return Path(str(resources.files("opd_ds")))


def find_local(value: str, key: str) -> Path | None:
    """The file or folder at `value`, with `~` replaced; None where there is none.

    Raises:
        UserError: nobody can look there, or it is a pipe or a device, naming `key`.
    """
    if not value.strip():
        raise UserError(f"{key} = {value!r}: is empty; give a path")
    try:
        place = Path(value).expanduser()
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # too long, forbidden, links in a circle; no such user; NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key} = {shown(value)}: {reason}; give a path that can be read") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{key} = {shown(value)}: is a pipe or a device; give a file or a folder")
    return place


def resolve_path(value: str, key: str) -> Path:
    """A local path, `package:<path inside opd_ds>`, or a hub id, fetched if need be: `org/name`, with a folder or a
    safetensors file behind it (`org/name/sub/folder`).

    Raises:
        UserError: nothing is there, naming the config key.
    """
    if value.startswith(PACKAGE_PREFIX):
        path = find_local(str(package_root() / value.removeprefix(PACKAGE_PREFIX)), key)
        if path is None:
            raise UserError(f"{key} = {shown(value)}: opd_ds carries no such file")
        return path
    local = find_local(value, key)
    if local is not None:
        return local.resolve()
    if value.startswith((".", "/", "~")) or not _HUB_ID.match(value):
        raise UserError(
            f"{key} = {shown(value)}: no such file or folder; give a path that exists or a hub id 'org/name'"
        )
    return _from_hub(value, key)


def _from_hub(value: str, key: str) -> Path:
    from huggingface_hub import snapshot_download

    org, name, *rest = value.split("/", 2)
    subfolder = rest[0] if rest else ""
    one_file = subfolder.endswith(".safetensors")
    patterns = None
    if one_file:  # PEFT writes a LoRA's alpha to a file of its own
        patterns = [subfolder, str(Path(subfolder).with_name("adapter_config.json"))]
    elif subfolder:
        patterns = [f"{subfolder}/*"]
    # Single-file and half-precision duplicates of the same weights are skipped.
    ignored = ["*.ckpt", "*.bin", "*.msgpack", "*.fp16.safetensors", "*.png", "*.jpg"]
    if not subfolder:
        ignored.append("sd3*.safetensors")
    try:
        root = Path(
            snapshot_download(f"{org}/{name}", allow_patterns=patterns, ignore_patterns=None if one_file else ignored)
        )
    except Exception as error:  # the hub client raises many kinds; the user needs one line, with the cause chained
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key} = {value!r}: no such local folder, and the model hub did not give it ({type(error).__name__}: "
            f"{reason}); log in with `hf auth login` if it is gated, or give a local folder"
        ) from error
    if not (root / subfolder).exists():
        raise UserError(f"{key} = {value!r}: the hub repository {org}/{name} has no {subfolder!r}")
    return root / subfolder


def resolve_ds_config(value: str, key: str) -> Path:
    """A DeepSpeed JSON: a path, or the name of one shipped in ds_configs/ (with or without that folder and ending)."""
    found = find_local(value, key)
    if found is not None and found.is_file():
        return found
    shipped = package_root() / "ds_configs"
    names = sorted(path.stem for path in shipped.glob("*.json"))
    name = value.removeprefix("ds_configs/").removesuffix(".json")
    if name in names:
        return shipped / f"{name}.json"
    raise UserError(f"{key} = {shown(value)}: no such file; shipped are {', '.join(names)}.{nearest(value, names)}")
