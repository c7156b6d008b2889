"""The application: OpenAI's endpoints over a scheduler, for any ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dfssm.base.errors import DfssmError
from dfssm.runtime import Engine, Scheduler

from . import errors
from .answers import Chats, Completions
from .errors import ApiError
from .guard import Guard
from .metrics import Metrics
from .schema import ChatRequest, CompletionRequest, TextRequest
from .service import Limits, Service, Texts

PAGE = Path(__file__).with_name("page.html")
COMPLETION_TOKENS = 16
"""Of a completion that asks for no number: OpenAI's default."""
CLIENT_LEFT = 499
"""Status, for the log, of an answer that nobody waits for."""

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


@dataclass(frozen=True)
class Served:
    """What is served, and how: `threads` of a step, and the arguments of `Scheduler` and `create_app`."""

    bundle: Path
    name: str
    key: str | None
    threads: int
    slots: int
    queue: int
    prefix_cache: int | None
    limits: Limits

    def open(self) -> tuple[FastAPI, Scheduler]:
        """The application, and its scheduler. Raises what `Engine.load` and `Scheduler` do."""
        engine = Engine.load(self.bundle, threads=self.threads)
        scheduler = Scheduler(engine, self.slots, self.queue, self.prefix_cache)
        return create_app(engine, scheduler, self.name, self.key, self.limits), scheduler


def create_app(
    engine: Engine,
    scheduler: Scheduler,
    name: str,
    key: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> FastAPI:
    """The application, which runs `scheduler` from its start-up to its shutdown.

    Args: `name`: of the model, to clients. `key`: the API key, None for none.
    """
    service, metrics, page = Service(engine, scheduler, name, limits), Metrics(scheduler), PAGE.read_text("utf-8")
    completions, chats = Completions(engine, name), Chats(engine, name)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        with scheduler:
            yield

    app = FastAPI(title="dfssm", lifespan=running, docs_url=None, redoc_url=None)
    app.state.scheduler = scheduler
    app.add_middleware(Guard, key=key, limits=limits, metrics=metrics)
    for kind in (HTTPException, RequestValidationError, DfssmError):
        app.add_exception_handler(kind, _answer)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        """Whether texts are made."""
        is_open = scheduler.open
        return JSONResponse({"status": "ok" if is_open else "down"}, 200 if is_open else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.require_model(model)
        return service.model

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        service.require_model(body.model)
        if body.best_of not in (None, body.n):
            raise ApiError(400, f"best_of is {body.best_of}: only n texts are made, leave it out", param="best_of")
        config = service.config(partial(body.config, logprobs=body.logprobs), body.tokens, COMPLETION_TOKENS)
        return await respond(completions, body, request, await service.texts(body.prompts, body.n, config))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.require_model(body.model)
        service.require_chat()
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        config = service.config(partial(body.config, logprobs=logprobs), body.tokens, limits.tokens)
        ids = await asyncio.to_thread(
            engine.chat_prompt, [message.plain for message in body.messages], tools=body.given
        )
        return await respond(chats, body, request, await service.texts([ids], body.n, config))

    return app


async def respond(answers: Completions, body: TextRequest, request: Request, texts: Texts) -> Response:
    """The answer in one piece or as a stream. Who leaves before its end cancels it."""
    request.state.texts = texts
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = answers.events(texts, with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    end, gone = asyncio.create_task(texts.end()), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((end, gone), return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            return Response(status_code=CLIENT_LEFT)
        end.result()
        return JSONResponse(answers.answer(texts))
    finally:
        texts.cancel()
        end.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer(request: Request, error: Exception) -> Response:
    status, body, headers = errors.answer(error)
    return JSONResponse(body, status, headers)
