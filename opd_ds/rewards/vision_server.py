"""A vision-language model behind an OpenAI-compatible server that the user names: questions about images, many at a
time, and what became of each.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from PIL import Image

from opd_ds.errors import UserError
from opd_ds.rewards.gaps import Result
from opd_ds.rewards.proxies import on_this_machine, proxy_hint

if TYPE_CHECKING:  # the extra `vlm`
    from openai.types.chat.chat_completion import Choice

API_KEY_VARIABLE = "OPD_DS_VLM_API_KEY"
_UNREACHABLE, _TIMEOUT = "connection failed", "timeout"
_NOT_TRIED = "not tried, the server is lost"


@dataclass(frozen=True)
class Connection:
    """Which server and model, and how it is asked.

    Attributes:
        base_url: of the server's OpenAI-compatible interface, ending in /v1.
        model: the name that the server serves it by.
        timeout: seconds for one answer.
        retries: further attempts after a connection error, time-out, 429 or 5xx, with growing pauses.
        concurrency: questions under way at the same time.
        api_key_variable: environment variable that holds the server's API key, if it wants one.
    """

    base_url: str
    model: str
    timeout: float
    retries: int
    concurrency: int
    api_key_variable: str


class VisionServer:
    """Asks questions about images at temperature 0.

    Args:
        reward: on whose behalf; messages name it.
        sampling: further fields of a request, such as max_tokens.

    Raises:
        UserError: at construction, when no server answers or it does not serve the model.
    """

    def __init__(self, reward: str, connection: Connection, sampling: Mapping[str, Any]) -> None:
        import openai

        key = os.environ.get(connection.api_key_variable) or "none"  # the client insists on one, local servers do not
        url = connection.base_url
        try:
            http = openai.DefaultHttpxClient(trust_env=not on_this_machine(url))
        except ImportError as error:  # a SOCKS proxy, which needs a further package
            raise UserError(f"reward {reward!r}: base_url = {url!r}: {error}{proxy_hint(url)}") from error
        self._client = openai.OpenAI(
            base_url=url,
            api_key=key,
            timeout=connection.timeout,
            max_retries=connection.retries,
            http_client=http,
        )
        self._connection, self._sampling = connection, dict(sampling)
        self._check(reward)

    def _check(self, reward: str) -> None:
        import openai

        url, model = self._connection.base_url, self._connection.model
        try:
            served = [entry.id for entry in self._client.models.list()]
        except openai.APIStatusError as error:
            raise UserError(
                f"reward {reward!r}: the server at {url} answered {error.status_code}; its API key is read from "
                f"${self._connection.api_key_variable}{proxy_hint(url)}"
            ) from error
        except openai.OpenAIError as error:
            raise UserError(
                f"reward {reward!r}: no server answers at base_url = {url!r} ({type(error).__name__}); docs/rewards.md "
                f"has commands that start one{proxy_hint(url)}"
            ) from error
        if model not in served:
            raise UserError(f"reward {reward!r}: model = {model!r} is not served at {url}; served: {', '.join(served)}")

    def ask(self, images: Sequence[Image.Image], question: str, **further: Any) -> Choice:
        """One answer about all of `images`, in their order.

        Raises:
            openai.OpenAIError: there is none, after all attempts.
        """
        shown = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        content = [*shown, {"type": "text", "text": question}]
        messages: Any = [{"role": "user", "content": content}]
        answer = self._client.chat.completions.create(
            model=self._connection.model, messages=messages, temperature=0, **{**self._sampling, **further}
        )
        return answer.choices[0]

    def results(
        self,
        images: Sequence[Sequence[Image.Image]],
        questions: Sequence[str],
        read: Callable[[Choice], Result],
        **further: Any,
    ) -> list[Result]:
        """What `read` makes of each answer, in order, or why there is none; a question is about one or several images.
        Once the server stays unreachable or silent
        after all retries, the rest is not tried.
        """
        import openai

        lost = Event()

        def one(shown: Sequence[Image.Image], question: str) -> Result:
            if lost.is_set():
                return _NOT_TRIED
            try:
                return read(self.ask(shown, question, **further))
            except openai.APIConnectionError as error:  # a time-out is one of these
                lost.set()
                return _TIMEOUT if isinstance(error, openai.APITimeoutError) else _UNREACHABLE
            except openai.APIStatusError as error:
                return f"http {error.status_code}"
            except Exception as error:  # garbage in place of the protocol fails anywhere in the client
                return f"garbage ({type(error).__name__})"

        with ThreadPoolExecutor(self._connection.concurrency) as pool:
            return list(pool.map(one, images, questions))


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
