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
from opd_ds.rewards.clips import takes_clips
from opd_ds.rewards.protocol import HeadInTime
from opd_ds.rewards.references import score_with, takes_references
from opd_ds.rewards.wire import CLIP_LIMITS, Asked, Info, Limits, RefusedError, ScoreResponse, decode_request, one_line

# One request is scored while the next arrives; further ones wait with all but the beginning of their bodies unread.
_REQUESTS_IN_MEMORY = 2
_UNHURRIED_BYTES = 2**16


def make_app(reward: Reward, limits: Limits | None = None) -> FastAPI:
    """The application that serves `reward`.

    A request that is malformed or over `limits` gets 4xx, one whose scoring raises gets 500, both with a reason in one
    line, `{"error": ...}`; the server keeps running.
    """
    kinds = {"takes_clips": takes_clips(reward), "takes_references": takes_references(reward)}
    limits = limits or (CLIP_LIMITS if any(kinds.values()) else Limits())
    app = FastAPI(title=f"opd-ds reward {reward.name}", openapi_url=None)
    slots = asyncio.Semaphore(_REQUESTS_IN_MEMORY)
    # Once: it may hash gigabytes of weights.
    who = Info(name=reward.name, identity=reward.identity(), **kinds)
    turn = threading.Lock()  # a reward is not asked to be safe for several threads

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, refusal: RefusedError) -> JSONResponse:
        return JSONResponse({"error": refusal.reason}, refusal.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info", response_model_exclude_defaults=True)
    async def info() -> Info:
        return who

    @app.post("/score")
    async def score(request: Request) -> ScoreResponse:
        body = _Body(request, limits)
        await body.arrive(beginning=_UNHURRIED_BYTES)  # a client that never gets there keeps nobody waiting
        async with slots:
            await body.arrive()
            return await run_in_threadpool(_score, reward, turn, body.content, limits)

    return app


class _Body:
    """The body of a request as it arrives. What is over the limit is read and dropped, so that the client is there to
    hear the refusal."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._parts, self._limits = request.stream(), limits
        self.content, self._size, self._ended = bytearray(), 0, False

    async def arrive(self, beginning: int | None = None) -> None:
        """Receive the rest, or the first bytes as far as `beginning`.

        Raises:
            RefusedError: it comes too slowly, the client is gone, or it is over the limit.
        """
        clock = asyncio.get_running_loop().time
        overdue = clock() + self._limits.seconds
        due, wanted = overdue, 0
        while not self._ended and (beginning is None or self._size < beginning):
            if beginning is None and self._size >= wanted:  # others wait meanwhile
                due, wanted = min(overdue, clock() + self._limits.pause), self._size + _UNHURRIED_BYTES
            try:
                part = await asyncio.wait_for(anext(self._parts, None), due - clock())
            except TimeoutError as error:
                raise RefusedError(408, f"the body did not arrive in time; {self._size} bytes came") from error
            except ClientDisconnect as error:
                raise RefusedError(400, "the client left before the end of its body") from error
            self._add(part)
        if self._ended and self._size > self._limits.body_bytes:
            raise RefusedError(413, f"the body has {self._size} bytes; at most {self._limits.body_bytes}")

    def _add(self, part: bytes | None) -> None:
        if part is None:
            self._ended = True
            return
        self._size += len(part)
        if self._size <= self._limits.body_bytes:
            self.content.extend(part)
        else:
            self.content.clear()


def _score(reward: Reward, turn: threading.Lock, body: bytearray, limits: Limits) -> ScoreResponse:
    of_clips = takes_clips(reward)
    asked = decode_request(body, limits, clips=of_clips)
    drawn = asked.drawn
    try:
        with turn:
            scores = _scored(reward, asked) if drawn else []
        if len(scores) != len(drawn):
            raise ValueError(f"{len(scores)} scores for {len(drawn)} {'clips' if of_clips else 'images'}")
    except Exception as error:  # the reward's own: the request fails, the server stays
        logging.getLogger("opd_ds").exception("reward %s failed", reward.name)
        raise RefusedError(500, f"the reward failed: {type(error).__name__}: {one_line(error)}") from error
    return ScoreResponse(scores=[score if math.isfinite(score) else None for score in scores])


def _scored(reward: Reward, asked: Asked) -> list[float]:
    found: list[float] = score_with(reward, asked.drawn, asked.prompts, asked.metadata, asked.references).tolist()
    return found


def serve(reward: Reward, host: str, port: int) -> None:
    """Serve until interrupted."""
    app = make_app(reward)
    uvicorn.run(app, host=host, port=port, http=HeadInTime, log_level="warning", timeout_graceful_shutdown=5)
