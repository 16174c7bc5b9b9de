"""HTTP answers with a deadline: the time-outs of requests and urllib3 begin again with every byte that arrives, so that
a server that sends one byte at a time holds its client for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.response import HTTPResponse

T = TypeVar("T")


def in_time(seconds: float, end: Callable[[], object], read: Callable[[], T]) -> T:
    """`read()`, which `end`, called from another thread, breaks off after `seconds`.

    Raises:
        TimeoutError: it was broken off.
    """
    late = threading.Event()

    def stop() -> None:
        late.set()
        with suppress(OSError, RuntimeError, ValueError):  # over in this moment, the connection given back or closed
            end()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        found = read()
    except Exception as error:  # whatever the end of the connection was to the reader
        if late.is_set():
            raise TimeoutError(f"no end of the answer within {seconds} s") from error
        raise
    finally:
        timer.cancel()
    if late.is_set():  # the end of the connection may look like the end of the answer
        raise TimeoutError(f"no end of the answer within {seconds} s")
    return found


def mount(session: requests.Session) -> requests.Session:
    """The session, whose requests have their time-out for status and headers together; the body is for `in_time`."""
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())
    return session


class _HeadInTime(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        connected, seconds = self.sock, self.timeout
        assert isinstance(seconds, int | float)
        return in_time(seconds, lambda: connected.shutdown(socket.SHUT_RDWR), super().getresponse)


class _HeadInTimeTLS(_HeadInTime, HTTPSConnection):
    pass


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **named: Any) -> HTTPConnectionPool:
        pool = super().get_connection_with_tls_context(*args, **named)
        pool.ConnectionCls = _HeadInTimeTLS if pool.scheme == "https" else _HeadInTime
        return pool
