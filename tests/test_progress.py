"""What long work writes off a terminal, and what a log line looks like."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_ds.cluster.rendezvous import extensions_folder
from opd_ds.utils import progress
from opd_ds.utils.logging import log_to_terminal
from opd_ds.utils.progress import duration, work

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    logger = logging.getLogger("opd_ds")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_a_line_every_half_minute_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log_to_terminal()
    with work("drawing base", 10, "images", done=2) as drawing:
        for seconds in (10, 10, 11, 10, 10, 100, 100, 5):  # of each image
            now[0] += seconds
            drawing.advance(status="fine")
    lines = [re.sub(f"^{STAMP}", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "drawing base: 8 images",
        "drawing base: 5 of 10 images, fine, 52 s left",
        "drawing base: 8 of 10 images, fine, 50 s left",
        "drawing base: 9 of 10 images, fine, 36 s left",
        "drawing base: 10 of 10 images, fine, in 4:16 min",
    ]


def test_what_is_done_at_once_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_terminal()
    with work("reading base", 2, "weights") as reading:
        reading.advance(2)
    with work("training", 1, "rounds") as training:
        training.advance(status="loss 1.0")
    lines = [re.sub(f"^{STAMP}", "", line) for line in capsys.readouterr().out.splitlines()]
    end = "training: 1 of 1 rounds, loss 1.0, in 0 s"
    assert lines == ["reading base: 2 weights", "training: 1 rounds", end]


def test_a_notebook_gets_lines_and_no_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel does
    log_to_terminal()
    with work("training", 1, "rounds") as training:
        training.advance(status="loss 1.0")
    assert [re.sub(f"^{STAMP}", "", line) for line in capsys.readouterr().out.splitlines()] == [
        "training: 1 rounds",
        "training: 1 of 1 rounds, loss 1.0, in 0 s",
    ]


def test_other_ranks_only_warn_and_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_terminal(3)
    with work("drawing base", 2, "images") as drawing:
        drawing.advance(2)
    logging.getLogger("opd_ds").warning("the reward %s is slow", "ocr")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(STAMP + r"\[rank 3\] warning: the reward ocr is slow\n", captured.err)
    log_to_terminal()
    log_to_terminal()  # as commands that run in one process do
    logging.getLogger("opd_ds").info("once [red]")
    assert re.fullmatch(STAMP + r"once \[red\]\n", capsys.readouterr().out)


def test_a_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("opd_ds").setLevel(logging.NOTSET)
    with work("drawing base", 2, "images") as drawing:
        drawing.advance()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (3599, "59:59 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(7260) == "2:01 h"


def test_environments_do_not_share_compiled_ops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = extensions_folder()
    assert here.parent == tmp_path / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", "/opt/another")
    assert extensions_folder() != here
