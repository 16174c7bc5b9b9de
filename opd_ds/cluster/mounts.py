"""What a container must see: the files and folders that a run's config names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from opd_ds.errors import UserError


def mounts_of(values: object, work_dir: Path) -> str:
    """SRC:DST,... of all that `values` (a config as plain data) names outside of `work_dir`.

    A file stands for its folder, for what lies beside it; a link for what it leads to, too; what does not exist yet for
    the folder in which it will be made.

    Raises:
        UserError: a path with a character that separates mounts.
    """
    folders = {folder for path in _paths(values) for folder in (_folder(path.absolute()), _folder(path.resolve()))}
    folders -= {folder for folder in folders if folder.is_relative_to(work_dir) or folder == Path(folder.anchor)}
    outermost = [folder for folder in sorted(folders) if not any(other in folder.parents for other in folders)]
    for folder in outermost:
        if set(str(folder)) & set(":,"):
            raise UserError(f"--container: {str(folder)!r} has : or , in it, which separate mounts; use another path")
    return ",".join(f"{folder}:{folder}" for folder in outermost)


def _paths(values: object) -> Iterator[Path]:
    """A text counts where something of that name exists: it may be a name on the hub, or no name at all."""
    if isinstance(values, Path):
        yield values.expanduser()
    elif isinstance(values, str):
        try:
            path = Path(values).expanduser()
            if values.strip() and path.exists():
                yield path
        except (OSError, RuntimeError, ValueError):  # too long, no such user, NUL: the name of no file
            return
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _paths(value)
    elif isinstance(values, Iterable):
        for value in values:
            yield from _paths(value)


def _folder(path: Path) -> Path:
    if path.is_file():
        return path.parent
    return next(place for place in (path, *path.parents) if place.is_dir())
