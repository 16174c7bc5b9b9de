"""Where an evaluation is kept, so that none takes the place of another."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path

from opd_ds.errors import UserError
from opd_ds.evaluation.results import RESULTS_FILE, Results, not_kept, read_results


def own_folder(folder: Path, new: Results) -> Path:
    """`folder`, which the user named.

    Raises:
        UserError: it holds another evaluation: one that `new`, an outline, does not keep all of.
    """
    lost = _lost(folder, new)
    if lost:
        raise UserError(
            f"--output {folder}: holds another evaluation, of which this one would not keep {lost}; give another folder"
        )
    return folder


def next_folder(first: Path, new: Results, *, taken: bool) -> Path:
    """The first of `first`, `first-2`, `first-3` ... with no evaluation, or one that `new`, an outline, keeps all of.

    Args:
        taken: `first` is somebody else's, whatever it holds.
    """
    numbered = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return next(folder for folder in chain([] if taken else [first], numbered) if not _lost(folder, new))


def _lost(folder: Path, new: Results) -> str:
    """What of the evaluation in `folder` would be lost."""
    file = folder / RESULTS_FILE
    return not_kept(read_results(file), new) if file.is_file() else ""
