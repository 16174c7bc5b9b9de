"""What the command says about itself."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from opd_ds import __version__
from opd_ds.cli.main import app


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"opd-ds {__version__}\n")


@pytest.mark.parametrize(("typed", "offered"), [("opd-ds reci", "recipes"), ("opd-ds recipes c", "copy")])
def test_bash_completes_commands(typed: str, offered: str) -> None:
    asked = {"_OPD_DS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    result = CliRunner().invoke(app, env=asked, prog_name="opd-ds")
    assert offered in result.output.split()
