"""The reward server and its client: what they agree on, and what either does when the other misbehaves."""

from __future__ import annotations

import base64
import io
import json
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

import pytest
import requests
import torch
from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards import Needs, build
from opd_ds.rewards.server import make_app
from opd_ds.rewards.wire import Limits
from tests.rewards.drawing import drawn, flat
from tests.rewards.servers import answering, process_serving, running


class Width:
    """The image's width plus the length of the prompt; `metadata["do"]` orders a fault."""

    name = "width"
    needs: ClassVar[Needs] = Needs()

    def __init__(self) -> None:
        self.inside = 0

    def identity(self) -> dict[str, Any]:
        return {"engine": "ruler"}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> torch.Tensor:
        self.inside += 1
        assert self.inside == 1, "two requests at once in a reward that is not made for it"
        try:
            return self._score(images, prompts, [data.get("do") for data in metadata or []])
        finally:
            self.inside -= 1

    def _score(self, images: list[Image.Image], prompts: list[str], orders: list[str | None]) -> torch.Tensor:
        if "raise" in orders:
            raise RuntimeError("the ruler\nis broken")
        if "slow" in orders:
            time.sleep(2.5)
        scores = torch.tensor([float(image.width + len(prompt)) for image, prompt in zip(images, prompts, strict=True)])
        scores[[order == "nan" for order in orders or [None] * len(images)]] = torch.nan
        return scores[1:] if "short" in orders else scores


@pytest.fixture
def served() -> Iterator[tuple[Width, str]]:
    reward = Width()
    with running(make_app(reward, Limits(body_bytes=200_000, images=4, pixels=100_000, seconds=1.0))) as url:
        yield reward, url


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_ds.rewards.remote._BACK_OFF_SECONDS", 0.01)


def png(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def request_of(*images: bytes, **changes: Any) -> bytes:
    texts = [base64.b64encode(image).decode() for image in images]
    return json.dumps({"images": texts, "prompts": ["a"] * len(texts), **changes}).encode()


# The protocol.


def test_a_remote_reward_gives_what_the_reward_gives(served: tuple[Width, str]) -> None:
    _, url = served
    reward = build("remote", url=url, batch_size=2)
    images, prompts = [flat("red", size) for size in (5, 6, 7)], ["", "ab", "abc"]
    assert torch.equal(reward.score(images, prompts), torch.tensor([5.0, 8.0, 10.0]))
    assert reward.name == "width"
    assert reward.identity() == {"served_at": url, "engine": "ruler"}
    scores = reward.score(images, prompts, [{}, {"do": "nan"}, {}])
    assert scores.isnan().tolist() == [False, True, False]
    assert reward.failures == {"without a score from the server": 1}
    assert reward.score([], []).shape == (0,)


def test_pixels_and_numbers_cross_the_wire_unchanged() -> None:
    images = [drawn("Text", 64), drawn("Text", 64).convert("L"), flat("blue", 3)]
    here = build("jpeg_compressibility")
    with running(make_app(here)) as url:
        assert torch.equal(build("remote", url=url).score(images, [""] * 3), here.score(images, [""] * 3))


def test_info_and_health(served: tuple[Width, str]) -> None:
    _, url = served
    assert requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}
    assert requests.get(f"{url}/info", timeout=5).json() == {"name": "width", "identity": {"engine": "ruler"}}


def test_requests_are_scored_one_at_a_time(served: tuple[Width, str]) -> None:
    _, url = served
    replies: list[int] = []

    def ask() -> None:
        replies.append(requests.post(f"{url}/score", request_of(png(flat("red"))), timeout=20).status_code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 12


# The server.

GOOD = png(drawn("Text", 64))
DAMAGED = GOOD[:60] + bytes([GOOD[60] ^ 0xFF]) + GOOD[61:]
REFUSED: dict[str, tuple[bytes, int, str]] = {
    "empty body": (b"", 400, "the body is not a request for scores"),
    "no JSON": (b"hello", 400, "the body is not a request for scores"),
    "pickle": (pickle.dumps({"images": []}), 400, "the body is not a request for scores"),
    "a list": (b"[]", 400, "the body is not a request for scores"),
    "deep nesting": (b'{"images": ' + b"[" * 50_000, 400, "the body is not a request for scores"),
    "images are a number": (request_of(images=3), 400, "images: "),
    "an image is a number": (request_of(images=[3], prompts=["a"]), 400, "images.0: "),
    "prompts absent": (b'{"images": []}', 400, "prompts: "),
    "a prompt is a number": (request_of(GOOD, prompts=[1]), 400, "prompts.0: "),
    "metadata are strings": (request_of(GOOD, metadata=["x"]), 400, "metadata.0: "),
    "an unknown key": (request_of(GOOD, extra=1), 400, "extra: "),
    "too few prompts": (request_of(GOOD, prompts=[]), 400, "differ in number"),
    "too much metadata": (request_of(GOOD, metadata=[{}, {}]), 400, "differ in number"),
    "no base64": (request_of(images=["%%%"], prompts=["a"]), 400, "image 0 is not a base64 PNG"),
    "base64 beyond ASCII": (request_of(images=["ä"], prompts=["a"]), 400, "image 0 is not a base64 PNG"),
    "no picture": (request_of(GOOD, b"hello"), 400, "image 1 is not a base64 PNG"),
    "an empty picture": (request_of(b""), 400, "image 0 is not a base64 PNG"),
    "a JPEG": (request_of(png(flat("red"), "JPEG")), 400, "image 0 is not a base64 PNG"),
    "truncated PNG": (request_of(GOOD, GOOD[: len(GOOD) // 2]), 400, "image 1 is damaged or truncated"),
    "PNG without pixels": (request_of(GOOD[:33]), 400, "image 0 "),
    "damaged PNG": (request_of(DAMAGED), 400, "image 0 is damaged or truncated"),
    "too many images": (request_of(*[GOOD] * 5), 413, "5 images; at most 4"),
    "a bomb": (request_of(png(flat("red", 400))), 413, "160000 pixels together; at most 100000"),
    "bombs in sum": (request_of(*[png(flat("red", 200))] * 3), 413, "120000 pixels together; at most 100000"),
    "too long a body": (b" " * 200_001, 413, "the body has 200001 bytes; at most 200000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_get_4xx_with_a_line_and_the_server_goes_on(case: str, served: tuple[Width, str]) -> None:
    _, url = served
    body, status, reason = REFUSED[case]
    reply = requests.post(f"{url}/score", body, timeout=10)
    assert reply.status_code == status
    assert reason in reply.json()["error"]
    assert "\n" not in reply.json()["error"]
    assert requests.post(f"{url}/score", request_of(GOOD), timeout=10).json() == {"scores": [65.0]}


def test_other_addresses_and_methods_are_4xx(served: tuple[Width, str]) -> None:
    _, url = served
    assert requests.get(f"{url}/score", timeout=5).status_code == 405
    assert requests.get(f"{url}/admin", timeout=5).status_code == 404


def test_a_body_that_does_not_arrive_is_408(served: tuple[Width, str]) -> None:
    _, url = served
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_clients_that_leave_do_not_block_the_server(served: tuple[Width, str]) -> None:
    _, url = served
    host, port = url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert requests.post(f"{url}/score", request_of(GOOD), timeout=10).json() == {"scores": [65.0]}


@pytest.mark.parametrize(
    ("order", "reason"),
    [("raise", "the reward failed: RuntimeError: the ruler is broken"), ("short", "0 scores for 1 images")],
)
def test_a_reward_that_fails_is_a_logged_500(
    order: str, reason: str, served: tuple[Width, str], caplog: pytest.LogCaptureFixture
) -> None:
    _, url = served
    reply = requests.post(f"{url}/score", request_of(GOOD, metadata=[{"do": order}]), timeout=10)
    assert reply.status_code == 500
    assert reason in reply.json()["error"]
    assert "reward width failed" in caplog.text
    assert requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}


# The client.


class Faulty:
    """A server that introduces itself well and answers /score with `fault`."""

    def __init__(self) -> None:
        self.fault = "none"
        self.asked = 0
        self.release = threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes] | None:
        if handler.path == "/health":
            return 200, b'{"status": "ok"}'
        if handler.path == "/info":
            return 200, b'{"name": "faulty", "identity": {}}'
        self.asked += 1
        count = len(json.loads(body)["images"])
        good = json.dumps({"scores": [1.0] * count}).encode()
        if self.fault == "slow":
            self.release.wait(10)
        if self.fault in TRICKLES or self.fault in ("hang up", "cut", "no HTTP"):
            return self._misbehave(handler, good)
        return FAULTS[self.fault][0] or (200, good)

    def _misbehave(self, handler: BaseHTTPRequestHandler, good: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(good)
        if self.fault == "no HTTP":
            handler.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
        elif self.fault == "cut":
            handler.wfile.write(head + good[:-4])
        elif self.fault in TRICKLES:
            begin, again = TRICKLES[self.fault]
            handler.wfile.write(begin)
            while not self.release.wait(0.1):
                handler.wfile.write(again)


# How an answer begins, and what then comes ten times a second, for ever.
TRICKLES = {
    "trickled body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
    "trickled body without a length": (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "trickled chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "trickled head": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "always going on": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}

# What /score answers (None: see the class), and the kind the client counts.
FAULTS: dict[str, tuple[tuple[int, bytes] | None, str]] = {
    "none": (None, ""),
    "500": ((500, b"oops"), "http 500"),
    "503": ((503, b""), "http 503"),
    "404": ((404, b"{}"), "http 404"),
    "redirect": ((302, b""), "http 302"),
    "empty": ((200, b""), "garbage from the server"),
    "garbage": ((200, b"\x00\xff<html>"), "garbage from the server"),
    "wrong JSON": ((200, b'{"result": [1, 2]}'), "garbage from the server"),
    "too few scores": ((200, b'{"scores": [1.0]}'), "garbage from the server"),
    "too many scores": ((200, b'{"scores": [1, 2, 3]}'), "garbage from the server"),
    "strings": ((200, b'{"scores": ["1", "2"]}'), "garbage from the server"),
    "booleans": ((200, b'{"scores": [true, false]}'), "garbage from the server"),
    "infinity": ((200, b'{"scores": [1e999, Infinity]}'), "garbage from the server"),
    "endless": ((200, b" " * 2**21), "garbage from the server"),
    "cut": (None, "connection failed"),
    "hang up": (None, "connection failed"),
    "no HTTP": (None, "connection failed"),
    "slow": (None, "timeout"),
    **dict.fromkeys(TRICKLES, (None, "timeout")),
}


@pytest.fixture
def faulty() -> Iterator[tuple[Faulty, str]]:
    server = Faulty()
    with answering(server) as url:
        yield server, url
        server.release.set()


def gap_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "have no score" in record.message]


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
def test_every_fault_is_a_counted_gap(fault: str, faulty: tuple[Faulty, str], caplog: pytest.LogCaptureFixture) -> None:
    server, url = faulty
    reward = build("remote", url=url, timeout=0.4, retries=1)
    server.fault = fault
    assert reward.score([flat("red")] * 2, ["a", "b"]).isnan().all()
    kind = FAULTS[fault][1]
    assert reward.failures == {kind: 2}
    assert server.asked == (1 if kind == "http 404" else 2)  # our own fault is not repeated
    assert gap_lines(caplog) == [f"reward faulty at {url}: 2 of 2 images have no score (2 {kind})"]
    server.fault = "none"
    server.release.set()
    assert reward.score([flat("red")] * 2, ["a", "b"]).tolist() == [1.0, 1.0]


def test_a_retry_that_succeeds_is_no_gap(faulty: tuple[Faulty, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, url = faulty
    reward = build("remote", url=url, retries=2)
    server.fault = "500"

    def repaired(_: float) -> None:
        server.fault = "none"

    monkeypatch.setattr("opd_ds.rewards.remote.time.sleep", repaired)
    assert reward.score([flat("red")], ["a"]).tolist() == [1.0]
    assert not reward.failures


def test_one_bad_batch_leaves_the_others(served: tuple[Width, str], caplog: pytest.LogCaptureFixture) -> None:
    _, url = served
    reward = build("remote", url=url, batch_size=2, retries=0)
    orders = [{}, {}, {"do": "raise"}, {}, {"ok": 1}]
    scores = reward.score([flat("red")] * 5, ["a"] * 5, orders)
    assert scores.isnan().tolist() == [False, False, True, True, False]
    scores = reward.score([flat("red")] * 5, ["a"] * 5, [{}, {}, {"do": object()}, {}, {}])
    assert scores.isnan().tolist() == [False, False, True, True, False]
    assert reward.failures == {"http 500": 2, "unfit for JSON and PNG": 2}
    assert len(gap_lines(caplog)) == 2


def test_a_slow_server_is_given_up_for_the_rest_of_the_call(faulty: tuple[Faulty, str]) -> None:
    server, url = faulty
    reward = build("remote", url=url, batch_size=1, retries=0, timeout=0.2)
    server.fault = "slow"
    assert reward.score([flat("red")] * 50, ["a"] * 50).isnan().all()
    assert server.asked == 1
    assert reward.failures == {"timeout": 50}


def test_a_server_that_is_killed_is_a_gap_and_comes_back() -> None:
    """The real command in its own process, `kill -9`, and a new one at the same address."""
    images, prompts = [flat("red", 32)] * 3, [""] * 3
    expected = build("jpeg_incompressibility").score(images, prompts)
    serve = ("-m", "opd_ds.cli", "rewards", "serve", "jpeg_incompressibility", "--port")
    with process_serving(*serve) as (process, url):
        reward = build("remote", url=url, retries=0)
        assert torch.equal(reward.score(images, prompts), expected)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert reward.score(images, prompts).isnan().all()
        assert reward.failures == {"connection failed": 3}
    with process_serving(*serve, port=int(url.rpartition(":")[2])):
        assert torch.equal(reward.score(images, prompts), expected)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://user:secret@host:1", "file:///etc"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="url: expected http://host:port") as caught:
        build("remote", url=url)
    assert "secret" not in str(caught.value)


def test_no_server_is_said_at_the_start(faulty: tuple[Faulty, str]) -> None:
    with pytest.raises(UserError, match=r"url = 'http://127\.0\.0\.1:9': no reward server answers there \(connection"):
        build("remote", url="http://127.0.0.1:9")
    with (
        answering(lambda *_: (200, b"<html>hello")) as url,
        pytest.raises(UserError, match="no reward server answers there"),
    ):
        build("remote", url=url)
    with pytest.raises(UserError, match="missing a required argument: 'url'"):
        build("remote")
