"""Any reward behind HTTP: `POST /score`, `GET /health`, `GET /info`. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
import logging
import math
import threading

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from opd_ds.rewards.base import Reward
from opd_ds.rewards.wire import Info, Limits, RefusedError, ScoreResponse, decode_request, one_line

# One request is scored while the next arrives; further ones wait with their bodies unread.
_REQUESTS_IN_MEMORY = 2


def make_app(reward: Reward, limits: Limits | None = None) -> FastAPI:
    """The application that serves `reward`.

    A request that is malformed or over `limits` gets 4xx, one whose scoring raises gets 500, both with a reason in one
    line, `{"error": ...}`; the server keeps running.
    """
    limits = limits or Limits()
    app = FastAPI(title=f"opd-ds reward {reward.name}", openapi_url=None)
    slots = asyncio.Semaphore(_REQUESTS_IN_MEMORY)
    who = Info(name=reward.name, identity=reward.identity())  # once: it may hash gigabytes of weights
    turn = threading.Lock()  # a reward is not asked to be safe for several threads

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, refusal: RefusedError) -> JSONResponse:
        return JSONResponse({"error": refusal.reason}, refusal.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> Info:
        return who

    @app.post("/score")
    async def score(request: Request) -> ScoreResponse:
        async with slots:
            body = await _read(request, limits)
            return await run_in_threadpool(_score, reward, turn, body, limits)

    return app


async def _read(request: Request, limits: Limits) -> bytearray:
    """The body. What is over the limit is read and dropped, so that the client is there to hear the refusal."""
    body, size = bytearray(), 0

    async def receive() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= limits.body_bytes:
                body.extend(part)
            else:
                body.clear()

    try:
        await asyncio.wait_for(receive(), limits.seconds)
    except TimeoutError as error:
        raise RefusedError(408, f"the body did not arrive within {limits.seconds} s") from error
    except ClientDisconnect as error:
        raise RefusedError(400, "the client left before the end of its body") from error
    if size > limits.body_bytes:
        raise RefusedError(413, f"the body has {size} bytes; at most {limits.body_bytes}")
    return body


def _score(reward: Reward, turn: threading.Lock, body: bytearray, limits: Limits) -> ScoreResponse:
    images, prompts, metadata = decode_request(body, limits)
    try:
        with turn:
            scores = reward.score(images, prompts, metadata).tolist() if images else []
        if len(scores) != len(images):
            raise ValueError(f"{len(scores)} scores for {len(images)} images")
    except Exception as error:  # the reward's own: the request fails, the server stays
        logging.getLogger("opd_ds").exception("reward %s failed", reward.name)
        raise RefusedError(500, f"the reward failed: {type(error).__name__}: {one_line(error)}") from error
    return ScoreResponse(scores=[score if math.isfinite(score) else None for score in scores])


def serve(reward: Reward, host: str, port: int) -> None:
    """Serve until interrupted."""
    uvicorn.run(make_app(reward), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
