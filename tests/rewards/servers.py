"""HTTP servers for tests: one whose answers a test writes, and the real one in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import uvicorn

# From the handler and the request's body to (status, body); None when the function wrote to the connection itself.
Answer = Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes] | None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server that answers every request with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a FastAPI application, under uvicorn as `opd-ds rewards serve` runs it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
