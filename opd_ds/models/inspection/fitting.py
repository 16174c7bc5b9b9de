"""Whether weights can be compared with a base's, before any network loads."""

from __future__ import annotations

from pathlib import Path

from opd_ds.errors import UserError, about
from opd_ds.models import ModelFamily, lora
from opd_ds.models.inspection.inspector import inspect


def check_weights(family: ModelFamily, key: str, value: str, path: Path, base: str, *, trust_base: bool) -> None:
    """Refuse weights that cannot be compared with the student's, before any network loads.

    Args:
        key, value: where the run config names them, and as what; `path` is where that was found.
        base: the student's base, as the run config names it.

    Raises:
        UserError: not a checkpoint, another base, scheduler, architecture or latent shape; a damaged file.
    """
    with about(f"{key} = {value!r}"):
        found = inspect(path)
        found.refuse_problem()
        if found.is_adapter:
            theirs = lora.named_base(path)
            if theirs and not trust_base and not lora.same_base(theirs, base):
                raise UserError(
                    f"the adapter was trained on base {theirs!r}, the student's is {base!r}; if these are one model "
                    f"under two names, set {key.rpartition('.')[0]}.trust_base=true"
                )
            family.check_adapter(path)
            return
        family.check_compatible(path)
