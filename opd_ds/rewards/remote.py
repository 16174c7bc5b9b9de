"""A reward that is served elsewhere (`opd-ds rewards serve NAME`), used like any other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlsplit

import requests
import urllib3
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs, Served, Takes, batches
from opd_ds.rewards.clips import Drawn
from opd_ds.rewards.deadline import in_time, mount
from opd_ds.rewards.gaps import CountsGaps, Gaps, Result
from opd_ds.rewards.proxies import on_this_machine, proxy_hint
from opd_ds.rewards.references import References
from opd_ds.rewards.wire import Info, decode_scores, encode_request, one_line

_BACK_OFF_SECONDS = 0.5
_REPLY_BYTES = 2**20  # a reply holds one number per image
_UNREACHABLE, _TIMEOUT, _GARBAGE = "connection failed", "timeout", "garbage from the server"
_NULL, _UNSENDABLE = "without a score from the server", "unfit for JSON and PNG"


class _RequestError(Exception):
    """A request that brought no scores; the message is the kind."""


class RemoteReward(Served, CountsGaps):
    """The scores of a reward server; range and unit are those of the reward it serves, whose name this one takes. It
    takes clips and reference pictures where that does.

    Failures are NaN for the images they concern, counted by kind in `failures`, one line in the log per call, never
    an exception: server gone, time-out, any HTTP error, garbage, a wrong number of scores. Once the server stays
    unreachable or silent after all retries, the rest of the call is not tried.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        timeout: seconds for a connection, for the head of the reply to one batch, and for its body, however they
            arrive.
        retries: further attempts after anything but a 4xx, with growing pauses.
        batch_size: images per request, and in memory as PNG; clips go one by one.

    Raises:
        UserError: at construction, when no such server answers.
    """

    name = "remote"
    needs: ClassVar[Needs] = Needs()

    def __init__(self, url: str, timeout: float = 60.0, retries: int = 2, batch_size: int = 8) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UserError("reward 'remote': url: expected http://host:port of an `opd-ds rewards serve`")
        self._url = url.rstrip("/")
        self._timeout, self._retries, self._batch_size = timeout, retries, batch_size
        self._served = self._ask_who()
        self.name, self.takes_clips = self._served.name, self._served.takes_clips
        self.takes_references = self._served.takes_references
        if self.takes_clips:
            self._batch_size = 1
        self._gaps = Gaps(f"{self.name} at {self._url}")

    @classmethod
    def takes_for(cls, options: Mapping[str, Any]) -> Takes:
        """As the server says."""
        served = cls(**options)
        return Takes(served.takes_clips, served.takes_references)

    def _ask_who(self) -> Info:
        try:
            with self._session() as session:
                self._request(session, "GET", "/health")
                return Info.model_validate_json(self._request(session, "GET", "/info"))
        except (_RequestError, ValueError) as error:
            raise UserError(
                f"reward 'remote': url = {self._url!r}: no reward server answers there ({one_line(error, 80)}); start "
                f"one with `opd-ds rewards serve NAME --port PORT`{proxy_hint(self._url)}"
            ) from error

    def identity(self) -> dict[str, Any]:
        """That of the served reward, as it was at construction."""
        return {"served_at": self._url, **self._served.identity}

    def score(
        self,
        images: list[Any],
        prompts: list[str],
        metadata: Metadata | None = None,
        references: References | None = None,
    ) -> Tensor:
        """[B] float32."""
        results: list[Result] = []
        lost: str | None = None
        with self._session() as session:  # of this call: several threads may be here
            for rows in batches(range(len(images)), self._batch_size):
                part = metadata and [metadata[i] for i in rows]
                beside = references and [references[i] for i in rows]
                try:
                    if lost:
                        raise _RequestError(lost)
                    asked = [images[i] for i in rows], [prompts[i] for i in rows]
                    scores = self._score(session, *asked, part, beside)
                    results += [_NULL if score is None else score for score in scores]
                except _RequestError as failure:
                    kind = str(failure)
                    lost = kind if kind in (_UNREACHABLE, _TIMEOUT) else None
                    results += [kind] * len(rows)
        return self._gaps.close(results)

    def _session(self) -> requests.Session:
        session = mount(requests.Session())
        session.trust_env = not on_this_machine(self._url)
        return session

    def _score(
        self,
        session: requests.Session,
        images: Sequence[Drawn],
        prompts: Sequence[str],
        part: Metadata | None,
        beside: References | None,
    ) -> list[float | None]:
        try:
            body = encode_request(images, prompts, part, beside)
        except Exception as error:  # Pillow and the JSON encoder raise anything for what they cannot write
            raise _RequestError(_UNSENDABLE) from error
        for attempt in range(self._retries + 1):
            try:
                return decode_scores(self._request(session, "POST", "/score", body), len(images))
            except ValueError:
                failure = _RequestError(_GARBAGE)
            except _RequestError as error:
                failure = error
            if attempt == self._retries or str(failure).startswith("http 4"):
                break
            time.sleep(_BACK_OFF_SECONDS * 2**attempt)
        raise failure

    def _request(self, session: requests.Session, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of a 200."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        try:
            with session.request(
                method,
                self._url + path,
                data=body,
                headers=headers,
                timeout=self._timeout,
                stream=True,
                allow_redirects=False,
            ) as reply:
                if reply.status_code != 200:
                    raise _RequestError(f"http {reply.status_code}")
                return in_time(self._timeout, reply.raw.shutdown, lambda: _read(reply))
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
            raise _RequestError(_TIMEOUT) from error
        except (OSError, urllib3.exceptions.HTTPError) as error:  # requests' errors are OSErrors
            raise _RequestError(_UNREACHABLE) from error


def _read(reply: requests.Response) -> bytes:
    """The body, bounded in size."""
    body = bytearray()
    while part := reply.raw.read1(2**16, decode_content=False):
        body += part
        if len(body) > _REPLY_BYTES:
            raise _RequestError(_GARBAGE)
    return bytes(body)
