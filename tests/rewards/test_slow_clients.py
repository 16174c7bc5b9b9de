"""The reward server and clients that never end their requests: nobody else waits for them, and they are let go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import requests

from opd_ds.rewards.server import make_app
from opd_ds.rewards.wire import Limits
from tests.rewards.drawing import drawn
from tests.rewards.servers import running
from tests.rewards.test_remote import Width, png, request_of

HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
ASK = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
GOOD = request_of(png(drawn("Text", 64)))


@pytest.fixture
def served() -> Iterator[str]:
    with running(make_app(Width(), Limits(seconds=20, pause=0.3))) as url:
        yield url


@pytest.fixture
def connect(served: str) -> Iterator[Connections]:
    with ExitStack() as stack:
        yield Connections(served, stack)


class Connections:
    """Opens connections to the server, which are closed with the test."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self._place = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._stack = stack

    def __call__(self, sent: bytes) -> socket.socket:
        connection = self._stack.enter_context(socket.create_connection(self._place, timeout=10))
        connection.sendall(sent)
        return connection


def seconds_for_an_answer(url: str) -> float:
    begin = time.monotonic()
    assert requests.post(f"{url}/score", GOOD, timeout=15).json() == {"scores": [65.0]}
    return time.monotonic() - begin


def is_answered(connection: socket.socket) -> bool:
    reply = b""
    while not reply.endswith(b"}"):
        reply += connection.recv(4096)
    return reply.startswith(b"HTTP/1.1 200")


def test_heads_and_beginnings_keep_nobody_waiting(served: str, connect: Connections) -> None:
    for sent in (b"", b"POST /sc", HEAD[:-2], HEAD, HEAD + b"{" * 60_000):
        for _ in range(10):
            connect(sent)
    assert seconds_for_an_answer(served) < 2


def test_a_trickled_body_keeps_nobody_waiting(served: str, connect: Connections) -> None:
    stop = threading.Event()

    def trickle(connection: socket.socket) -> None:
        while not stop.wait(0.05):
            connection.sendall(b" ")

    threads = [threading.Thread(target=trickle, args=(connect(HEAD),)) for _ in range(10)]
    for thread in threads:
        thread.start()
    try:
        assert max(seconds_for_an_answer(served) for _ in range(3)) < 2
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_bodies_that_stop_in_the_middle_are_let_go_after_a_pause(served: str, connect: Connections) -> None:
    stopped = [connect(HEAD + b" " * 100_000) for _ in range(6)]
    assert seconds_for_an_answer(served) < 3  # two at a time, 0.3 s each
    for connection in stopped:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_large_body_that_comes_in_good_time_is_scored(served: str, connect: Connections) -> None:
    padded = GOOD + b" " * 400_000
    connection = connect(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(padded))
    for start in range(0, len(padded), 40_000):
        connection.sendall(padded[start : start + 40_000])
        time.sleep(0.05)
    assert is_answered(connection)


def test_a_head_that_does_not_end_is_let_go(served: str, connect: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_ds.rewards.protocol.HEAD_SECONDS", 0.3)
    again = connect(ASK)
    assert is_answered(again)
    again.sendall(ASK[:-2])
    for connection in (connect(b""), connect(HEAD[:-2]), again):
        assert connection.recv(4096) == b""
    kept_alive = connect(ASK)
    assert is_answered(kept_alive)
    time.sleep(0.5)
    kept_alive.sendall(ASK)
    assert is_answered(kept_alive)
