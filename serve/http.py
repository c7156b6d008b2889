"""The HTTP server: uvicorn, with bounds on the time of connections and an orderly end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from dfssm.base.errors import DfssmError, reason
from dfssm.runtime import Scheduler

from .errors import body

BACKLOG = 2048
BUFFER = 64 << 10
"""Bytes that wait to be sent on a connection before its sender does; the kernel has about twice as many besides."""


class Timer:
    """Calls a function once, so many seconds after the first `start`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float):
        self._loop, self._seconds = loop, seconds
        self._handle: asyncio.TimerHandle | None = None

    def start(self, function: Callable[[], object]) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, function)

    def cancel(self) -> None:
        if self._handle:
            self._handle.cancel()
        self._handle = None


class Connection(H11Protocol):
    """A connection that is closed where a request's head does not come, or an answer is not read, within SECONDS."""

    SECONDS = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=BUFFER)
        self._head, self._answer = Timer(self.loop, self.SECONDS), Timer(self.loop, self.SECONDS)
        self._head.start(self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._head.start(self._late)
        else:
            self._head.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.cancel()
        self._answer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer.start(self.transport.abort)

    def resume_writing(self) -> None:
        self._answer.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    def _late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, f"there is no request after {self.SECONDS:.0f} s")

    def _refuse(self, status: int, message: str) -> None:
        """An answer without a request."""
        content = json.dumps(body(status, message)).encode()
        kind, length = "content-type: application/json", f"content-length: {len(content)}"
        head = "\r\n".join(
            [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", kind, length, "connection: close", "", ""]
        )
        self.transport.write(head.encode() + content)
        self.transport.close()


class Server(uvicorn.Server):
    """After SIGTERM or Ctrl-C it takes no more requests, and ends: those that are there have `grace` seconds, then an
    error in their answers. A second signal ends it at once.
    """

    def __init__(self, app: FastAPI, scheduler: Scheduler, grace: float):
        # Answers get a moment more than texts, to say that these were cancelled.
        config = uvicorn.Config(
            app, http=Connection, ws="none", log_config=None, access_log=False, lifespan="on",
            timeout_graceful_shutdown=int(grace) + 5, server_header=False,
        )  # fmt: skip
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._scheduler.close, self._grace))
        await super().shutdown(sockets)
        await closing


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. DfssmError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # those that it accepts have it, too
        opened.bind(address)
        opened.listen(BACKLOG)
        return opened
    except (OSError, UnicodeError) as error:  # a name with a part of 64 characters is none
        raise DfssmError(
            f"{host} port {port}: cannot listen there ({reason(error)}); give another --host or --port"
        ) from None
