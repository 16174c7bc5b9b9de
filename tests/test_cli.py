"""What the command says about itself."""

from __future__ import annotations

import os

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


def test_recipes_are_listed_with_and_without_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")  # so that the end of the test brings back what was there
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    listed = CliRunner().invoke(app, ["recipes", "list"])
    assert listed.output == CliRunner().invoke(app, ["recipes"]).output
    assert "mopd_sd35m " in listed.output
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"  # before any command imports it


def test_processes_that_are_no_number_are_refused_before_anything_is_read() -> None:
    result = CliRunner().invoke(app, ["train", "--config", "absent.yaml", "--dry-run", "--processes", "2x"])
    assert str(result.exception) == "--processes '2x': expected a number, or NODESxPROCESSES as in 4x8"
