"""A small, fixed part of `python -m benchmarks bad-input`: every input is accepted or refused in one clear line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from benchmarks.bad_input import trial
from benchmarks.bad_input.kinds import KINDS
from benchmarks.bad_input.report import offline
from benchmarks.bad_input.trial import Kind, command, try_many, try_one
from opd_ds.errors import COLUMNS, UserError, fitted, shown

EXAMPLES = 8


@pytest.fixture(autouse=True)
def _without_a_hub() -> Iterator[None]:
    with offline():
        yield


@pytest.mark.parametrize("name", KINDS)
def test_every_input_has_a_good_answer(name: str) -> None:
    tally = try_many(KINDS[name], EXAMPLES, 0)
    assert tally.answers.total() >= len(KINDS[name].known)
    assert not tally.failed


def nothing(_: Any, folder: Path) -> None:
    (folder / "kept").write_text("x")


def raises(error: Exception) -> Any:
    def ask(_: Any, folder: Path) -> None:
        raise error

    return ask


def removes(_: Any, folder: Path) -> None:
    (folder / "kept").unlink()


def hangs(_: Any, folder: Path) -> None:
    time.sleep(5)


@pytest.mark.parametrize(
    ("ask", "answer", "reason"),
    [
        (raises(UserError("key = 1: allowed is 2")), "refused", ""),
        (raises(UserError("\n".join(["key = 1: allowed is 2"] * 9))), "refused", ""),  # those that fit are shown
        (raises(UserError("x" * 400)), "failed", "a problem is cut"),
        (raises(KeyError("key")), "failed", "KeyError at outside"),
        (removes, "failed", "files were changed"),
        (hangs, "failed", "no answer after 1 s"),
        (lambda *_: command(["data", "check", "none.txt"]), "refused", ""),
        (lambda *_: command(["recipes"]), "accepted", ""),
    ],
)
def test_what_a_good_answer_is(ask: Any, answer: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 1)
    found = try_one(Kind("any", st.none(), nothing, ask), None)
    assert found[0] == answer
    assert reason in found[1]
    assert bool(found[1]) == bool(reason)


def test_messages_fit_on_three_lines() -> None:
    begin = "opd-ds: error: "
    assert fitted(["a", "b"], begin) == "opd-ds: error: a\nopd-ds: error: b"
    assert fitted(["a", "b", "c", "d"], begin) == "opd-ds: error: a\nopd-ds: error: b\nopd-ds: error: and 2 more"
    assert fitted(["a" * 200, "b", "c"], begin).endswith("a\nopd-ds: error: and 2 more")
    cut = fitted(["a" * 200 + "b" * 200, "c"], begin)
    assert len(cut) <= 3 * COLUMNS
    assert cut.startswith("opd-ds: error: aaa")
    assert cut.endswith("bbb (and 1 more)")


def test_values_are_shown_in_part() -> None:
    assert shown("a\n\ud83d") == r"'a\n\ud83d'"
    assert len(shown("x" * 10**6)) <= 80
    assert shown(10**5000) == "a number of int"
