"""Isolated environments for the reference libraries, built from exact requirement files, and calls into them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from opd_ds.errors import UserError, nearest

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements"
WORKER = HERE / "worker.py"
_STAMP = "opd_ds_requirements.sha256"


@dataclass(frozen=True)
class Phase:
    """One call of pip: its options, and the lines of its requirement file."""

    options: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Requirements:
    """What an environment consists of: a pip requirement file, in which two comments have a meaning.

    `# pip OPTIONS` begins another call of pip, with these options; `# import MODULE ...` names what must import when
    all is installed.
    """

    phases: tuple[Phase, ...]
    imports: tuple[str, ...]
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Requirements:
        phases: list[tuple[tuple[str, ...], list[str]]] = [((), [])]
        imports: list[str] = []
        for line in text.splitlines():
            if line.startswith("# pip "):
                phases.append((tuple(line.split()[2:]), []))
            elif line.startswith("# import "):
                imports += line.split()[2:]
            elif line.strip() and not line.startswith("#"):
                phases[-1][1].append(line.strip())
        found = tuple(Phase(options, tuple(lines)) for options, lines in phases if lines)
        return cls(found, tuple(imports), hashlib.sha256(text.encode()).hexdigest())


def names() -> list[str]:
    """The reference libraries that there are requirements for."""
    return sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))


def requirements(name: str) -> Requirements:
    """Raises UserError for an unknown name."""
    allowed = names()
    if name not in allowed:
        raise UserError(f"reference library {name!r}: unknown; allowed: {', '.join(allowed)}.{nearest(name, allowed)}")
    return Requirements.parse((REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8"))


def default_folder(name: str) -> Path:
    return Path("~/.cache/opd_ds/envs").expanduser() / name


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one reference library."""

    name: str
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *arguments: str) -> None:
        """`worker.py NAME ...` by this environment's Python; its output goes to the terminal.

        Raises:
            UserError: it failed.
        """
        self._call(arguments[0], self.worker(*arguments))

    def worker(self, *arguments: str) -> list[str]:
        """The command line of that."""
        # -I: neither this package's folder nor the user's PYTHONPATH is importable there.
        return [str(self.python), "-I", str(WORKER), self.name, *arguments]

    def pip(self, number: int, phase: Phase) -> None:
        """Install one phase.

        Raises:
            UserError: pip failed.
        """
        file = self.folder / f"requirements-{number}.txt"
        file.write_text("\n".join(phase.lines) + "\n", encoding="utf-8")
        self._call("pip install", [str(self.python), "-m", "pip", "install", *phase.options, "-r", str(file)])

    def _call(self, what: str, command: list[str]) -> None:
        code = subprocess.run(command).returncode
        if code != 0:
            raise UserError(
                f"reference library {self.name!r}: {what} failed in {self.folder} (exit code {code}, see above)"
            )


def build(name: str, folder: Path | None = None) -> Environment:
    """The environment of `name` in `folder`; what is there is kept when it was built from the same requirements.

    Raises:
        UserError: unknown name, a folder that holds something else, or an installation that fails.
    """
    wanted = requirements(name)
    environment = Environment(name, folder or default_folder(name))
    stamp = environment.folder / _STAMP
    if environment.python.is_file() and stamp.is_file() and stamp.read_text() == wanted.sha256:
        return environment
    _make(environment)
    for number, phase in enumerate(wanted.phases, start=1):
        environment.pip(number, phase)
    environment.run("import", *wanted.imports)
    stamp.write_text(wanted.sha256)  # last: what was interrupted is built again
    return environment


def _make(environment: Environment) -> None:
    folder = environment.folder
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder} holds something else than an environment; give another folder")
    code = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)]).returncode
    if code != 0:
        raise UserError(f"no virtual environment could be made in {folder} (exit code {code}, see above)")
