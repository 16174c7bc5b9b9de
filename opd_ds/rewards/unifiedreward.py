"""UnifiedReward: a vision-language model that grades an image, behind an OpenAI-compatible server of its own."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from torch import Tensor

from opd_ds.rewards.base import Metadata, Needs, Served
from opd_ds.rewards.gaps import CountsGaps, Gaps, Result
from opd_ds.rewards.vision_server import API_KEY_VARIABLE, Connection, VisionServer

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice

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
_UNPARSABLE = "answer without a grade"


def grade(answer: str | None) -> float | None:
    """The number in 1..5 after the last `Final Score:`, or None."""
    found = _GRADE.findall(answer or "")
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 5 else None


class UnifiedReward(Served, CountsGaps):
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
        self._model = model
        self._gaps = Gaps(self.name)
        connection = Connection(base_url, model, timeout, retries, concurrency, api_key_variable)
        self._server = VisionServer(self.name, connection, {"max_tokens": _MAX_TOKENS})

    def identity(self) -> dict[str, Any]:
        prompt = hashlib.sha256(_PROMPT.encode()).hexdigest()
        return {"engine": "OpenAI-compatible server", "model": self._model, "temperature": 0, "prompt_sha256": prompt}

    def score(self, images: list[Image.Image], prompts: list[str], metadata: Metadata | None = None) -> Tensor:
        """[B] float32."""
        questions = [_PROMPT.format(prompt=prompt) for prompt in prompts]
        return self._gaps.close(self._server.results([[image] for image in images], questions, _read))


def _read(answer: Choice) -> Result:
    value = grade(answer.message.content)
    return _UNPARSABLE if value is None else value
