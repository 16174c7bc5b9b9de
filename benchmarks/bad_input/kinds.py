"""All kinds of input that are tried."""

from __future__ import annotations

from benchmarks.bad_input import configs, environments, hostfiles, prompts, requests, weights
from benchmarks.bad_input.trial import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for module in (configs, prompts, weights, environments, hostfiles, requests)
    for kind in module.KINDS
}
