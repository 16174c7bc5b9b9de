"""`opd-ds doctor`: what this machine offers a run, and what would stop one. Loads no model."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from opd_ds import TORCHVISION_PROBLEM, __version__

_PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "datasets", "tensorboard")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `problem` is None when all is well, else what to do."""

    what: str
    found: str
    problem: str | None = None


def examine() -> list[Finding]:
    """Versions, accelerator, compiler, torchvision, space for temporary files."""
    findings = [Finding("opd-ds", __version__), Finding("Python", platform.python_version())]
    findings += [_package(name) for name in _PACKAGES]
    return [*findings, _torchvision(), _accelerator(), _compiler(), _home()]


def problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.problem is not None]


def as_text(findings: list[Finding], *, as_json: bool) -> str:
    """A line per finding, its problem below it; or JSON with `ok` and `findings`."""
    if as_json:
        return json.dumps({"ok": not problems(findings), "findings": [asdict(f) for f in findings]}, indent=1)
    lines = [f"{finding.what:16} {finding.found}" for finding in findings]
    lines += [f"{finding.what}: {finding.problem}" for finding in problems(findings)]
    return "\n".join(lines)


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "absent", "pip install opd-ds")


def _torchvision() -> Finding:
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return Finding("torchvision", "absent, not needed")
    if TORCHVISION_PROBLEM is None:
        return Finding("torchvision", f"{found}, loads, not needed")
    return Finding(
        "torchvision",
        f"{found}, does not load ({TORCHVISION_PROBLEM}); it is treated as absent",
        "nothing here needs it: pip uninstall torchvision, or install the build that belongs to your torch",
    )


def _accelerator() -> Finding:
    import torch

    if not torch.accelerator.is_available():
        return Finding("accelerator", f"none, {os.cpu_count()} CPU cores")
    kind = torch.accelerator.current_accelerator()
    return Finding("accelerator", f"{torch.accelerator.device_count()} x {kind}")


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return Finding("C++ compiler", "absent", "several processes on CPU need one once: apt install g++, or set CXX")
    return Finding("C++ compiler", compiler)


def _home() -> Finding:
    folder = os.environ.get("HF_HOME", os.path.expanduser("~"))
    free = shutil.disk_usage(folder if os.path.isdir(folder) else os.path.expanduser("~")).free / 2**30
    problem = "less than 10 GiB for downloaded models; set HF_HOME to a larger disk" if free < 10 else None
    return Finding("disk for models", f"{free:.0f} GiB free ({folder})", problem)
