"""The JSON of the answers, whole and as events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dfssm.runtime import Engine, Request, TokenLogprobs

from . import errors
from .service import Texts, raise_failure

_REASONS = {"length": "length", "eos": "stop", "stop": "stop"}
"""A text's `finish_reason` -> that of the API."""


@dataclass
class Sent:
    """How much of a text has been sent, in characters and in tokens, and whether its beginning and its end have.
    `offset`: characters of the names of these tokens.
    """

    characters: int = 0
    tokens: int = 0
    offset: int = 0
    begun: bool = False
    ended: bool = False


class Completions:
    """Answers of /v1/completions, by the model `name`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, name: str):
        self._tokenizer, self._name = engine.tokenizer, name

    def answer(self, texts: Texts) -> dict[str, Any]:
        """One object, when all texts have ended."""
        choices = [self._choice(request, index, Sent(), whole=True) for index, request in enumerate(texts.requests)]
        return self._object(texts, self.whole, choices) | {"usage": usage(texts)}

    async def events(self, texts: Texts, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, each with what has come of a text since its last one."""
        marks = [Sent() for _ in texts.requests]
        try:
            async for _ in texts.changes():
                for index, (request, sent) in enumerate(zip(texts.requests, marks, strict=True)):
                    if not sent.ended and (choice := self._choice(request, index, sent)):
                        yield event(self._object(texts, self.chunk, [choice]))
            if with_usage:
                yield event(self._object(texts, self.chunk, []) | {"usage": usage(texts)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already, so this is an event
            yield event(errors.answer(error)[1])
        finally:
            texts.cancel()

    def _choice(self, request: Request, index: int, sent: Sent, whole: bool = False) -> dict[str, Any]:
        """What is not `sent` of a text, and is then; empty where that is nothing."""
        sent.ended = request.finish_reason is not None  # before the text is looked at: nothing comes after it
        raise_failure(request)
        text, logprobs = request.text, request.logprobs
        if not sent.ended and (len(text), len(logprobs)) == (sent.characters, sent.tokens):
            return {}
        choice = {
            "index": index,
            **self._text(text[sent.characters :], whole, sent.begun),
            "logprobs": None if request.config.logprobs is None else self._logprobs(logprobs[sent.tokens :], sent),
            "finish_reason": _REASONS[request.finish_reason] if sent.ended and request.finish_reason else None,
        }
        sent.begun, sent.characters, sent.tokens = True, len(text), len(logprobs)
        return choice

    def _object(self, texts: Texts, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        names = {"id": f"{self.prefix}-{texts.id}", "object": kind, "created": texts.created, "model": self._name}
        return names | {"choices": choices}

    def _text(self, text: str, whole: bool, begun: bool) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, entries: Sequence[TokenLogprobs], sent: Sent) -> dict[str, Any]:
        """Of the tokens that are not `sent`."""
        names = [self._token(entry.token) for entry in entries]
        *offsets, sent.offset = accumulate(map(len, names), initial=sent.offset)
        return {
            "tokens": names,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._token(token): value for token, value in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def _token(self, token: int) -> str:
        """A token as text, with U+FFFD for bytes that are a part of a character."""
        return self._tokenizer.decode([token], skip_special_tokens=False)


class Chats(Completions):
    """Answers of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _text(self, text: str, whole: bool, begun: bool) -> dict[str, Any]:
        role = {} if begun else {"role": "assistant"}
        return {"message" if whole else "delta": role | {"content": text}}

    def _logprobs(self, entries: Sequence[TokenLogprobs], sent: Sent) -> dict[str, Any]:
        content = [
            self._entry(entry.token, entry.logprob) | {"top_logprobs": [self._entry(*pair) for pair in entry.top]}
            for entry in entries
        ]
        return {"content": content}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._token(token)
        return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}


def usage(texts: Texts) -> dict[str, Any]:
    """The tokens of the prompts, each counted once, and of the texts."""
    generated = sum(len(request.tokens) for request in texts.requests)
    return {
        "prompt_tokens": texts.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": texts.prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in texts.firsts)},
    }


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
