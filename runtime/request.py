"""One text of a scheduler: what was asked for, and what has come of it so far."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dfssm.base.numbers import require_whole

from .generation import GenerationConfig
from .prefix_cache import Key
from .rows import RECENT
from .sampler import Sampler, TokenLogprobs
from .slots import Slot
from .text import StopFilter, TextStream

if TYPE_CHECKING:
    from .engine import Engine


class Request:
    """A text that a `Scheduler` makes, and an iterator over its pieces, for one thread. Nothing waits for who reads it
    slowly: the pieces are longer then.

    Attributes:
        config: what was asked for. prompt_tokens: how many tokens the prompt has; cached_tokens: how many of them the
            prefix cache had.
        tokens: the generated ids, without the one that ended the text. text: what is certain of the text. logprobs: of
            each token, where they were asked for.
        finish_reason: "length", "eos", "stop", "cancelled" or "error"; None until the text has ended. It is set last.
        error: what went wrong, where it is "error"; iterating raises it.
        submitted, begun, ended: when it was given, had its first token, and ended (`time.monotonic`; 0: not yet).
    """

    def __init__(
        self,
        engine: Engine,
        prompt: np.ndarray,
        config: GenerationConfig,
        keys: Sequence[Key],
        notify: Callable[[], object] | None,
    ):
        self.config, self.prompt, self.prompt_tokens, self.cached_tokens = config, prompt, len(prompt), 0
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.submitted, self.begun, self.ended = time.monotonic(), 0.0, 0.0
        self._engine, self._ends = engine, engine.ends(config)
        self._given = 0  # characters that the iterator has returned
        self._news = threading.Event()
        self.notify = notify or self._wake
        # What the scheduler looks at. `keep`: after how many tokens of the prompt the prefix cache gets the state.
        self.keys, self.keep = keys, set[int]()
        self.slot: Slot | None = None
        self.cancelled = False
        self.back: tuple[int, GenerationConfig] | None = None
        self._write([], [])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            self._news.wait()
            self._news.clear()
            ended = self.finish_reason is not None
            piece = self.text[self._given :]
            self._given += len(piece)
            if ended:
                self._news.set()
            if piece:
                return piece
            if self.error:
                raise self.error
            if ended:
                raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self.sampler.logprobs[: len(self.tokens)]

    def _wake(self) -> None:
        """There is more for the iterator, which clears `_news` before it looks: where that is still set, it will."""
        if not self._news.is_set():  # a tenth of the time of setting it
            self._news.set()

    def cancel(self) -> None:
        """End it before the next step, which frees its slot. One that has ended stays as it is."""
        self.cancelled = True

    def rewind(self, tokens: int, **options: Any) -> None:
        """Before the next step, take back all generated tokens but the first `tokens`, and go on from there; `options`
        as in `Scheduler.submit`, seed=2 say. What the iterator has returned it does not return again.
        """
        require_whole("tokens", tokens)
        self.back = tokens, dataclasses.replace(self.config, **options)

    # ---- for the scheduler ----

    @property
    def row(self) -> int:
        assert self.slot
        return self.slot.row

    @property
    def read(self) -> int:
        """How many tokens its slot has read."""
        assert self.slot
        return self.slot.tokens

    @property
    def known(self) -> int:
        """How many there are to read, before another is chosen."""
        return self.prompt_tokens + len(self.tokens)

    def run_length(self, piece: int) -> int:
        """How many tokens its next run has: the prompt is cut at multiples of `piece`, the text is read one by one."""
        return min(piece, self.prompt_tokens - self.read) if self.read < self.prompt_tokens else 1

    def next(self, count: int) -> list[int]:
        """The next `count` tokens that its slot reads."""
        at = self.read - self.prompt_tokens
        return self.prompt[self.read : self.read + count].tolist() if at < 0 else self.tokens[at : at + count]

    @property
    def complete(self) -> bool:
        """Whether it has as many tokens as it may have."""
        return len(self.tokens) == self.config.max_tokens

    def take(self, token: int) -> str | None:
        """`token` is the next one. Returns why the text ends, None where it does not."""
        self.begun = self.begun or time.monotonic()
        if token in self._ends:
            return self._ends[token]
        self._push(token)
        if self._filter.stopped:
            return "stop"
        if self.complete:
            return "length"
        self.notify()
        return None

    def end(self, reason: str, error: Exception | None = None) -> None:
        """It ends here. What was held back of its text comes, up to a stop string that this may still contain."""
        if reason not in ("cancelled", "error") and not self._filter.stopped:
            rest = self._filter.push(self._stream.flush())
            self.text += rest + self._filter.flush()
        if self._filter.stopped:
            reason = "stop"
        self.error, self.ended = error, time.monotonic()
        self.finish_reason = reason
        self.notify()

    def go_back(self) -> None:
        """Do what `rewind` asked for."""
        assert self.back
        (count, self.config), self.back = self.back, None
        self._ends = self._engine.ends(self.config)
        self._write(self.tokens[:count], self.logprobs[:count])

    def _write(self, tokens: Sequence[int], logprobs: list[TokenLogprobs]) -> None:
        """The text is that of `tokens`."""
        self._stream = TextStream(self._engine.vocabulary, self.prompt[-RECENT:].tolist())
        self._filter = StopFilter(tuple(self.config.stop or ()))
        self.sampler = Sampler(self.config, self.prompt.tolist(), tokens)
        self.sampler.logprobs = logprobs
        self.tokens, self.text = list[int](), ""
        for token in tokens:
            self._push(token)

    def _push(self, token: int) -> None:
        piece = self._filter.push(self._stream.push(token))
        self.tokens.append(token)
        self.text += piece
