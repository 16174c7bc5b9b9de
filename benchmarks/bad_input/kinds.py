"""All kinds of input that are tried."""

from __future__ import annotations

from benchmarks.bad_input import configs, environments, prompts, requests
from benchmarks.bad_input.trial import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind for module in (configs, prompts, environments, requests) for kind in module.KINDS
}
