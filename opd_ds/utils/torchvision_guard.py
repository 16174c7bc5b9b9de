"""A torchvision that does not load must not take us down: nothing here needs it, but transformers and diffusers import
it as soon as they find it (its PyPI wheels are linked against CUDA builds of one exact torch version)."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec


def hide_broken_torchvision() -> str | None:
    """Make a torchvision that fails to import look absent; returns the reason, or None when all is well.

    Costs a look-up where torchvision is not installed. Call before transformers or diffusers are imported.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except Exception as error:  # whatever its import raises (RuntimeError, OSError, ImportError): it is unusable
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # find_spec and import then say it is absent
        warnings.warn(f"torchvision is installed but does not load ({reason}); going on without it", stacklevel=2)
        return reason
    return None
