"""UnifiedReward: a vision-language model that grades an image, behind an OpenAI-compatible server of its own."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from opd_ds.errors import UserError
from opd_ds.rewards.base import Metadata, Needs
from opd_ds.rewards.gaps import CountsGaps, Gaps, Result
from opd_ds.rewards.proxies import on_this_machine, proxy_hint

API_KEY_VARIABLE = "OPD_DS_VLM_API_KEY"
# The point-wise prompt that the model was trained on and that Flow-GRPO uses with UnifiedReward-7b-v1.5, word for word
# (github.com/CodeGoat24/UnifiedReward, inference_*/image_generation/point_score_image_generation.py;
# github.com/yifan123/flow_grpo, rewards.py): other words would give other scores. The server's chat template puts the
# image before it.
_PROMPT = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this "
    "image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
_GRADE = re.compile(r"Final Score:[\s*]*(\d+(?:\.\d+)?)", re.IGNORECASE)
_MAX_TOKENS = 1024
_UNREACHABLE, _TIMEOUT, _UNPARSABLE = "connection failed", "timeout", "answer without a grade"
_NOT_TRIED = "not tried, the server is lost"


def grade(answer: str | None) -> float | None:
    """The number in 1..5 after the last `Final Score:`, or None."""
    found = _GRADE.findall(answer or "")
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 5 else None


class UnifiedReward(CountsGaps):
    """Alignment and quality as graded by UnifiedReward-7b-v1.5: the raw grade, range [1, 5], higher is better.

    This is the unit of the DiffusionOPD paper's tables (about 3 for SD3.5-Medium); Flow-GRPO divides it by 5. An answer
    without a grade, a time-out or a server that is gone is NaN, counted in `failures`, one line in the log per call;
    once the server stays unreachable or silent after all retries, the rest of the call is not tried.

    `docs/rewards.md` has the commands that start a server with sglang or vllm.

    Args:
        base_url: of the server's OpenAI-compatible interface, ending in /v1.
        model: the name that the server serves it by.
        timeout: seconds for one answer.
        retries: further attempts after a connection error, time-out, 429 or 5xx, with growing pauses.
        concurrency: images under way at the same time.
        api_key_variable: environment variable that holds the server's API key, if it wants one.

    Raises:
        UserError: at construction, when no server answers or it does not serve the model.
    """

    name = "unifiedreward"
    needs: ClassVar[Needs] = Needs(packages=("openai",), extra="vlm")

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:17140/v1",
        model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
        timeout: float = 60.0,
        retries: int = 2,
        concurrency: int = 8,
        api_key_variable: str = API_KEY_VARIABLE,
    ) -> None:
        import openai

        key = os.environ.get(api_key_variable) or "none"  # the client insists on one, local servers do not
        try:
            http = openai.DefaultHttpxClient(trust_env=not on_this_machine(base_url))
        except ImportError as error:  # a SOCKS proxy, which needs a further package
            raise UserError(
                f"reward 'unifiedreward': base_url = {base_url!r}: {error}{proxy_hint(base_url)}"
            ) from error
        self._client = openai.OpenAI(
            base_url=base_url, api_key=key, timeout=timeout, max_retries=retries, http_client=http
        )
        self._model, self._concurrency = model, concurrency
        self._gaps = Gaps(self.name)
        try:
            served = [entry.id for entry in self._client.models.list()]
        except openai.APIStatusError as error:
            raise UserError(
                f"reward 'unifiedreward': the server at {base_url} answered {error.status_code}; its API key is read "
                f"from ${api_key_variable}{proxy_hint(base_url)}"
            ) from error
        except openai.OpenAIError as error:
            raise UserError(
                f"reward 'unifiedreward': no server answers at base_url = {base_url!r} ({type(error).__name__}); "
                f"docs/rewards.md has the command that starts one{proxy_hint(base_url)}"
            ) from error
        if model not in served:
            raise UserError(
                f"reward 'unifiedreward': model = {model!r} is not served at {base_url}; served: {', '.join(served)}"
            )

    def identity(self) -> dict[str, Any]:
        prompt = hashlib.sha256(_PROMPT.encode()).hexdigest()
        return {"engine": "OpenAI-compatible server", "model": self._model, "temperature": 0, "prompt_sha256": prompt}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        lost = Event()  # set when the server is gone: what is still waiting in this call is given up

        def score_one(image: Image.Image, prompt: str) -> Result:
            return _NOT_TRIED if lost.is_set() else self._score_one(image, prompt, lost)

        with ThreadPoolExecutor(self._concurrency) as pool:
            return self._gaps.close(list(pool.map(score_one, images, prompts)))

    def _score_one(self, image: Image.Image, prompt: str, lost: Event) -> Result:
        import openai

        try:
            value = grade(self._ask(image, prompt))
        except openai.APIConnectionError as error:  # a time-out is one of these
            lost.set()
            return _TIMEOUT if isinstance(error, openai.APITimeoutError) else _UNREACHABLE
        except openai.APIStatusError as error:
            return f"http {error.status_code}"
        except Exception as error:  # garbage in place of the protocol fails anywhere in the client
            return f"garbage ({type(error).__name__})"
        return _UNPARSABLE if value is None else value

    def _ask(self, image: Image.Image, prompt: str) -> str | None:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        answer = self._client.chat.completions.create(
            model=self._model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": _PROMPT.format(prompt=prompt)},
                    ],
                }
            ],
            temperature=0,
            max_tokens=_MAX_TOKENS,
        )
        return answer.choices[0].message.content
