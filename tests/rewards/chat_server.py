"""An OpenAI-compatible server for tests: it answers what the caption orders."""

from __future__ import annotations

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

MODEL = "CodeGoat24/UnifiedReward-7b-v1.5"


class Judge:
    """Grades by what the caption orders: a number is the grade, anything else is what it says, or a fault.

    Attributes:
        tokens: by caption, the answer as tokens: each with its alternatives' probabilities, the chosen one first.
        url: where it answers, once it does.
        log_probabilities: whether it gives them to who asks for them; None: it refuses such requests.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, list[dict[str, float]]] = {}
        self.log_probabilities: bool | None = False
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.models = [MODEL]
        self.status: dict[str, list[int]] = {}  # by caption: what to answer before the right answer
        self.release = threading.Event()
        self.busy, self.most_busy = 0, 0
        self._lock = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes] | None:
        self.headers.append(handler.headers.get("Authorization"))
        if handler.path.endswith("/models"):
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in self.models]
            return 200, json.dumps({"object": "list", "data": listed}).encode()
        request = json.loads(body)
        with self._lock:
            self.requests.append(request)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            caption = request["messages"][0]["content"][-1]["text"].rpartition("[")[2].partition("]")[0]
            if request.get("logprobs") and self.log_probabilities is None:
                return 400, b'{"error": {"message": "logprobs is not supported"}}'
            return self._answer(caption, request.get("logprobs") and self.log_probabilities)
        finally:
            with self._lock:
                self.busy -= 1

    def _answer(self, caption: str, log_probabilities: bool) -> tuple[int, bytes]:
        if self.status.get(caption):
            return self.status[caption].pop(0), b'{"error": {"message": "no"}}'
        if caption == "slow":
            self.release.wait(10)
        if caption == "busy":
            time.sleep(0.05)
        if caption == "garbage":
            return 200, b"<html>not json"
        if caption == "empty":
            return 200, b'{"choices": []}'
        text = f"cat (animal): 1\nFinal Score: {caption}" if caption[:1].isdigit() else caption
        tokens = self.tokens.get(caption, [{text: 1.0}])
        text = "".join(next(iter(token)) for token in tokens)
        message: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        if log_probabilities:
            message["logprobs"] = {"content": [_token(alternatives) for alternatives in tokens]}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [message]}
        return 200, json.dumps(answer).encode()


def _token(alternatives: dict[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in alternatives.items()]
    return {**top[0], "top_logprobs": top}
