"""From names in a config to files: local paths, `package:` paths, hub ids, shipped ds_configs."""

from __future__ import annotations

import re
import stat
from importlib import resources
from pathlib import Path

from opd_ds.errors import UserError, nearest, shortened, shown

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(/.+)?$")
# Relative paths of config files that nothing beside the file has, and where that was: errors say both places.
_NOT_BESIDE: dict[str, Path] = {}


def package_root() -> Path:
    return Path(str(resources.files("opd_ds")))


def find_local(value: str, key: str) -> Path | None:
    """The file or folder at `value`, with `~` replaced; None where there is none.

    Raises:
        UserError: nobody can look there, it is a pipe or a device, or a recipe's placeholder, naming `key`.
    """
    if _is_placeholder(value):
        raise UserError(f"{key} = {value!r} stands for something of your own: give --set {key}=... or set it in a file")
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


def read_text(file: Path, what: str) -> str:
    """The text of a file, which messages call `what`.

    Raises:
        UserError: it is not there, is no file, may not be read, or is not UTF-8.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{what} {file}: is a folder, a pipe or a device; give a file")
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{what} {file} does not exist") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{what} {file}, line {line}: not UTF-8; convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"{what} {shortened(str(file), 100)}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL character in its name
        raise UserError(f"{what} {str(file)!r}: {error}") from error


def beside(value: str, folder: Path, key: str, *, only_file: bool = False) -> str:
    """A path that a config file in `folder` names: in full if it is there beside the file, else as it stands, to be
    looked for from the working folder (or in the package, or on the hub).

    Raises:
        UserError: as `find_local`.
    """
    if not value.strip() or value.startswith((PACKAGE_PREFIX, "/", "~")) or _is_placeholder(value):
        return value
    found = find_local(str(folder.absolute() / value), key)
    if found is not None and (found.is_file() or not only_file):
        return str(found)
    _NOT_BESIDE[value] = folder.absolute()
    return value


def same_place(one: str, other: str) -> bool:
    """Whether two values name the same: word for word, or one local file or folder."""
    if one == other:
        return True
    places = [Path(value).expanduser() for value in (one, other)]
    return all(place.exists() for place in places) and places[0].samefile(places[1])


def looked_for(value: str) -> str:
    """Where a relative path was looked for, for an error message; empty for another."""
    if Path(value).expanduser().is_absolute():
        return ""
    folders = dict.fromkeys(str(place) for place in (_NOT_BESIDE.get(value), Path.cwd()) if place is not None)
    return f" in {' or in '.join(folders)}"


def _is_placeholder(value: str) -> bool:
    """Whether a recipe leaves this to the user, as `<LoRA for text>`."""
    return value.startswith("<") and value.endswith(">")


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
            f"{key} = {shown(value)}: no such file or folder{looked_for(value)}; give a path that exists or a hub id "
            "'org/name'"
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
            f"{key} = {value!r}: nothing of that name{looked_for(value)}, and the model hub did not give it "
            f"({type(error).__name__}: {reason}); log in with `hf auth login` if it is gated, or give a local folder"
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
    raise UserError(
        f"{key} = {shown(value)}: no such file{looked_for(value)}; shipped are {', '.join(names)}."
        f"{nearest(value, names)}"
    )
