"""What every request passes first: the key, the bounds of its body, and, at its end, the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import errors
from .errors import ApiError
from .metrics import Metrics
from .service import Limits, Texts

LOG = logging.getLogger("dfssm.serve")
OPEN = "/", "/health"
"""Paths that take no key."""


class Guard:
    """ASGI middleware. `key`: what `Authorization: Bearer` must have, None for nothing."""

    def __init__(self, app: ASGIApp, key: str | None, limits: Limits, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope.setdefault("state", {})
        try:
            self._admit(Request(scope))
            await self._app(scope, self._bounded(receive), sending)
        except Exception as error:
            if status:  # the answer has begun
                raise
            code, body, headers = errors.answer(error)
            await JSONResponse(body, code, headers)(scope, receive, sending)
        finally:
            self._record(scope, status, time.monotonic() - begin)

    def _admit(self, request: Request) -> None:
        """ApiError for a request that is refused by its headers."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and request.url.path not in OPEN and not hmac.compare_digest(_digest(given), self._key):
            raise ApiError(401, "the API key is missing or wrong: give it as Authorization: Bearer KEY", close=True)
        if int(request.headers.get("content-length", "0")) > self._limits.body:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is too long: at most {self._limits.body} bytes may be sent", close=True)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` of a body that is bounded in bytes and time."""
        read, more, deadline = 0, True, time.monotonic() + self._limits.body_seconds

        async def bounded() -> Message:
            nonlocal read, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body is not there after {self._limits.body_seconds:.0f} s: send it at once", close=True
                ) from None
            read, more = read + len(message.get("body", b"")), message.get("more_body", False)
            if read > self._limits.body:
                raise self._too_long()
            return message

        return bounded

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        fields: dict[str, Any] = {
            "method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)
        }  # fmt: skip
        texts: Texts | None = scope["state"].get("texts")
        if texts:
            fields |= texts.figures()
        self._metrics.record(fields)
        LOG.info("answered", extra={"fields": fields})


def _digest(text: str) -> bytes:
    """Of one length, whatever the text: the time of a comparison says nothing."""
    return hashlib.sha256(text.encode()).digest()
