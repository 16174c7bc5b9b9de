"""Small files that are found in place of a large one that was not downloaded."""

from __future__ import annotations

from pathlib import Path

_PAGE = "a web page; the download gave a page instead of the file, download it again"
STAND_INS = {  # by their first bytes, in lower case
    b"version https://git-lfs.github.com/spec": "a git-lfs pointer, not the file itself: run `git lfs pull` there",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
}


def stand_in(file: Path) -> str | None:
    """What stands in place of the file, with what to do; None: nothing that is known."""
    with file.open("rb") as stream:
        start = stream.read(512).lstrip().lower()
    return next((what for begin, what in STAND_INS.items() if start.startswith(begin)), None)
