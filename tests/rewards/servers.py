"""HTTP servers for tests: one whose answers a test writes, and the real one in a thread."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]

# From the handler and the request's body to (status, body); None when the function wrote to the connection itself.
Answer = Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes] | None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server that answers every request with `answer`."""

    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            connections.append(self.request)
            super().setup()

        def do_POST(self) -> None:
            reply = answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if reply is None:
                self.close_connection = True
                return
            self.send_response(reply[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply[1])))
            self.end_headers()
            self.wfile.write(reply[1])

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Tests read the client's log."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that gave up is what these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        for connection in connections:  # those kept alive would go on being answered
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a FastAPI application, under uvicorn as `opd-ds rewards serve` runs it."""
    import uvicorn

    from opd_ds.rewards.protocol import HeadInTime

    settings = uvicorn.Config(app, port=0, http=HeadInTime, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def process_serving(*arguments: str, port: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Python process with these arguments and a port after them, once it answers at its address."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
    command = [sys.executable, *arguments, str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                requests.get(f"{url}/health", timeout=1)
                break
            except requests.ConnectionError:
                assert process.poll() is None, "the server ended before it answered"
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()
