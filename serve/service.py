"""What the endpoints share: the scheduler, the limits, and the texts of one request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import time
from typing import Any

from dfssm.base.errors import DfssmError
from dfssm.runtime import Engine, GenerationConfig, Request, Scheduler
from dfssm.targets.text import encode

from .errors import ApiError


@dataclass(frozen=True)
class Limits:
    """What a request may take; more is refused with a status of 4xx that says how much may be."""

    body: int = 4 << 20
    """Bytes of a request's body."""
    body_seconds: float = 30
    """Time until all of it is there."""
    prompt: int = 32_768
    """Tokens of a prompt."""
    tokens: int = 4096
    """Tokens of a text; also what a chat gets that asks for no number."""
    texts: int = 16
    """Texts of a request: prompts times n."""
    stops: int = 16
    """Stop strings and stop ids."""


class Service:
    """A model with a name, and the scheduler that makes its texts."""

    def __init__(self, engine: Engine, scheduler: Scheduler, name: str, limits: Limits):
        self.engine, self.scheduler, self.name, self.limits = engine, scheduler, name, limits
        try:
            chat = bool(engine.chat_template)
        except DfssmError:  # it has none
            chat = False
        self.model = {"id": name, "object": "model", "created": int(time()), "owned_by": "dfssm", "chat": chat}

    def require_model(self, name: str | None) -> None:
        """ApiError where a request names another model."""
        if name not in (None, self.name):
            raise ApiError(
                404, f"the model {name!r} is not served here, {self.name!r} is", param="model", code="model_not_found"
            )

    def require_chat(self) -> None:
        """ApiError where the model cannot chat; the engine's error names the folder, which is not for clients."""
        if not self.model["chat"]:
            raise ApiError(400, f"the model {self.name!r} has no chat template: use /v1/completions", param="model")

    def config(self, make: Callable[[int], GenerationConfig], tokens: int | None, default: int) -> GenerationConfig:
        """What `make` makes of the number of tokens. ApiError for more than may be asked for."""
        most = self.limits.tokens
        tokens = min(default, most) if tokens is None else tokens
        if tokens > most:
            raise ApiError(400, f"max_tokens is {tokens}: at most {most} may be asked for", param="max_tokens")
        config = make(tokens)
        stops = len(list(config.stop or ())) + len(list(config.stop_ids))  # type: ignore[arg-type]
        if stops > self.limits.stops:
            raise ApiError(400, f"there are {stops} stops: at most {self.limits.stops} may be given", param="stop")
        return config

    async def texts(self, prompts: Sequence[str | list[int]], n: int, config: GenerationConfig) -> Texts:
        """Ask for `n` texts of each prompt; those of a prompt that has a seed have this and the following ones.

        Raises ApiError where that is too much, DfssmError for what cannot be run, QueueFull.
        """
        if len(prompts) * n > self.limits.texts:
            raise ApiError(400, f"{len(prompts)} prompts with n = {n}: at most {self.limits.texts} texts", param="n")
        if not self.scheduler.open:
            raise ApiError(503, "the server is shutting down")
        texts = Texts()
        try:
            for prompt in prompts:
                ids = await asyncio.to_thread(self._ids, prompt)
                texts.prompt_tokens += len(ids)
                for index in range(n):
                    texts.requests.append(self.scheduler.submit(ids, config.of_text(index), notify=texts.notify))
                texts.firsts.append(texts.requests[-n])
        except BaseException:
            texts.cancel()
            raise
        return texts

    def _ids(self, prompt: str | list[int]) -> list[int]:
        ids = encode(prompt, self.engine.tokenizer) if isinstance(prompt, str) else prompt
        if len(ids) > self.limits.prompt:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens: at most {self.limits.prompt} may be given",
                param="prompt",
                code="context_length_exceeded",
            )
        return ids


class Texts:
    """The texts of one HTTP request, for one task of the event loop that is current."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.firsts: list[Request] = []  # of each prompt
        self.prompt_tokens = 0
        self.id, self.created = secrets.token_hex(12), int(time())
        self._news, self._loop, self._told = asyncio.Event(), asyncio.get_running_loop(), False

    def notify(self) -> None:
        """Called in the scheduler's thread."""
        if not self._told:  # waking the loop is a write to a pipe, for each token otherwise
            self._told = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._news.set)

    def figures(self) -> dict[str, Any]:
        """What the log says of them."""
        begun = [request.begun - request.submitted for request in self.requests if request.begun]
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": sum(request.cached_tokens for request in self.firsts),
            "generated_tokens": sum(len(request.tokens) for request in self.requests),
            "first_token_seconds": round(min(begun), 4) if begun else None,
            "finish_reasons": [request.finish_reason for request in self.requests],
        }

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    async def changes(self) -> AsyncIterator[None]:
        """Comes each time that there is more, and a last time when all have ended."""
        ended = False
        while not ended:
            await self._news.wait()
            self._news.clear()
            self._told = False  # before the texts are looked at
            ended = all(request.finish_reason for request in self.requests)
            yield

    async def end(self) -> None:
        """Until all have ended. ApiError where one has failed."""
        async for _ in self.changes():
            for request in self.requests:
                raise_failure(request)


def raise_failure(request: Request) -> None:
    """Raise why a text failed, if it did."""
    if isinstance(request.error, DfssmError):  # of the model, not of what was asked
        raise ApiError(500, str(request.error))
    if request.error:
        raise request.error
    if request.finish_reason == "cancelled":
        raise ApiError(503, "the server is shutting down")
