"""One run of text generation: prompt in, pieces of text out, with the figures of the run beside them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.numbers import require_whole
from dfssm.targets.text import encode

from .sampler import Sampler, TokenLogprobs
from .sampling import Sampling
from .speculation import Draft, Speculation
from .state import State
from .text import StopFilter, TextStream

if TYPE_CHECKING:
    from asyncio import Future

    from .engine import Engine
    from .request import Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationConfig(Sampling):
    """How a text is made: how its tokens are chosen, which are the fields of `Sampling`, and when it ends.

    Attributes:
        max_tokens: it has at most so many.
        stop: strings that end it and are not part of it.
        stop_ids: tokens that end it and are not part of it, as a stop string does.
        eos: tokens that end it, instead of the model's own; () is none.
        ignore_eos: the same as eos=(): the text goes on after the model's end.
    """

    max_tokens: int = 128
    stop: str | Iterable[str] | None = ()
    stop_ids: int | Iterable[int] = ()
    eos: int | Iterable[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("max_tokens", self.max_tokens)
        stop = self.stop if isinstance(self.stop, Iterable | None) else [self.stop]
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(text, str) for text in stop):
            raise DfssmError(f"stop is {self.stop!r}: give a string, or a list of them")
        object.__setattr__(self, "stop", stop)
        for name in ("stop_ids", "eos"):
            ids = getattr(self, name)
            object.__setattr__(self, name, tuple(ids) if isinstance(ids, Set | Iterator) else ids)
        if self.ignore_eos and self.eos not in (None, ()):
            raise DfssmError(f"eos is {self.eos!r} with ignore_eos: give one of them")

    def of_text(self, index: int) -> Self:
        """Of several texts of one prompt, the config of that at `index`: its seed, if any, is that much higher."""
        return self if self.seed is None else replace(self, seed=self.seed + index)


@dataclass(frozen=True)
class Completion:
    """A text that has ended; the attributes are those of `Generation`."""

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[TokenLogprobs]

    @classmethod
    def of(cls, made: Generation | Request) -> Completion:
        """What has come of a text that has ended."""
        assert made.finish_reason
        return cls(made.text, list(made.tokens), made.finish_reason, made.prompt_tokens, made.logprobs)


class Generation:
    """Iterator over the pieces of a text; see `Engine.generate`. The prompt is read at the first `next`.

    `async for` makes each piece in a thread, so that the event loop goes on meanwhile. Where the task is cancelled, the
    step that runs comes to its end, and the generation is closed.

    A state that the caller gave has read the prompt and all of `tokens` at every moment, so a text that is cut short,
    by `close`, an error or Ctrl-C, goes on from it as if it had not been: its pieces come once their tokens are read.
    The state serves one generation at a time, until that has ended, was closed (`with` does so) or is gone.

    Attributes:
        tokens: the generated ids, without the one that ended it. text: the pieces joined. whole_text: of all tokens,
            also what belongs to a stop string.
        logprobs: of each of `tokens`, where they were asked for.
        finish_reason: "length" (max_tokens reached), "eos", "stop" (a stop string or id), "cancelled" (closed before
            its end, or an error was raised) or None (not finished).
        prompt_tokens: how many tokens the prompt had. prefill_seconds: time of reading it.
        steps, decode_seconds: tokens read after it, and the time of that and of choosing them.
        speculation: of drafts, where they were asked for: `runs` of the model, drafts that were read and `kept`.
        state: the caller's, or one of its own, which need not have read the last token. A character of which it has
            read a part is shown by the generation that completes it; only where none can follow is that part shown,
            as U+FFFD (see `flush`).
    """

    _claimed = False

    def __init__(
        self,
        engine: Engine,
        prompt: str | np.ndarray,
        config: GenerationConfig,
        state: State | None,
        after: Generation | None,
        speculate: int,
        draft: Draft,
    ):
        if state is not None:
            if state.batch != 1:
                raise DfssmError(f"generate continues one sequence, the state has {state.batch}: use state.row(i)")
            state.require_sound()
            if state.span.start in state.rows.claimed:
                raise DfssmError("a generation is open on the state: read it to its end, or close() it")
        fresh = state is None or not state.tokens[0]
        if isinstance(prompt, str):
            # Special tokens open a text: they do not belong into the middle of one.
            prompt = np.array(encode(prompt, engine.tokenizer, fresh), np.int64)
        self._prompt = prompt
        self.prompt_tokens = len(self._prompt)
        if fresh and not self.prompt_tokens:
            raise DfssmError("the prompt is empty: give at least one token, or a state to continue from")
        self._engine, self.config, self._max_tokens = engine, config, config.max_tokens
        self._ends, self._owns_state = engine.ends(config), state is None
        given, generated = after.history if after else ([], [])
        if self.prompt_tokens:  # another turn
            given, generated = [*given, *generated, *self._prompt.tolist()], []
        self._sampler, self._before = Sampler(config, given, generated), len(generated)
        self.state = engine.new_state() if state is None else state
        self.speculation = Speculation(engine, self.state, speculate, draft) if speculate else None
        self._stream: TextStream | None = None
        self._filter = StopFilter(tuple(config.stop or ()))
        self.tokens: list[int] = []
        self.text = self.whole_text = ""  # without and with what may be the beginning of a stop string
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = 0
        self.state.rows.claimed.add(self.state.span.start)
        self._claimed = True

    @property
    def history(self) -> tuple[list[int], list[int]]:
        """What penalties and processors see: the tokens that were given, and those that were generated."""
        return self._sampler.prompt, self._sampler.generated[: self._before + len(self.tokens)]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self._sampler.logprobs[: len(self.tokens)]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while self.finish_reason is None:
            try:
                piece = self._next()
            except BaseException:
                self.close()
                raise
            if piece:
                return piece
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        import asyncio  # 30 ms, for those who use it

        step = asyncio.ensure_future(asyncio.to_thread(next, self, None))
        try:
            piece = await asyncio.shield(step)
        except asyncio.CancelledError:
            step.add_done_callback(self._close_after)
            await asyncio.wait([step])
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def _close_after(self, step: Future[str | None]) -> None:
        step.exception()  # nobody else looks at it
        self.close()

    def result(self) -> Completion:
        """Make the rest of the text, and return all of it."""
        for _ in self:
            pass
        return Completion.of(self)

    def __repr__(self) -> str:
        end = self.finish_reason or "not finished"
        return f"<Generation: {self.prompt_tokens} + {len(self.tokens)} tokens, {end}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._claimed:
            self._release()

    def close(self) -> None:
        """End it here, and let another go on from the state. `text` is then that of all `tokens`, also what was held
        back because a stop string might have begun.
        """
        if self.finish_reason is None:
            self.text = self.text if self._filter.stopped else self.whole_text
            self.finish_reason = "cancelled"
        self._release()

    def flush(self) -> str:
        """After the iteration, where nothing will go on from the caller's state: the part of a character that the text
        ends in, as U+FFFD.
        """
        rest = self._stream.flush() if self._stream and not self._filter.stopped else ""
        self.text += rest
        return rest

    def _next(self) -> str:
        """Choose a token; what became certain of the text by it."""
        stream = self._stream or self._start()
        if self._owns_state and self.tokens:
            self._read(self.tokens[-1])
        if len(self.tokens) == self._max_tokens:
            return self._end("length")
        start = time.perf_counter()
        token, logit = self._engine.choose(self.state, self._sampler)
        self.decode_seconds += time.perf_counter() - start
        if not math.isfinite(logit):
            self._engine.require_finite(self.state)
        if token in self._ends:
            return self._end(self._ends[token])
        text = stream.push(token)
        piece = self._filter.push(text)
        position = self.state.tokens[0]
        try:
            if not self._owns_state:
                self._read(token)
        finally:
            if self._owns_state or self.state.tokens[0] > position:  # it was read, also where Ctrl-C came meanwhile
                self.tokens += [token]
                self.whole_text += text
                self.text += piece
        if self._filter.stopped:
            return piece + self._end("stop")
        if len(self.tokens) == self._max_tokens:
            return piece + self._end("length")
        return piece

    def _start(self) -> TextStream:
        """Read the prompt."""
        if self.speculation:
            before = self.state.recent[0]
            self.speculation.begin([*before[before >= 0].tolist(), *self._prompt.tolist()])
        if self.prompt_tokens:
            start = time.perf_counter()
            self._engine.prefill(self._prompt, self.state)
            self.prefill_seconds = time.perf_counter() - start
        recent = self.state.recent[0]
        self._stream = TextStream(self._engine.vocabulary, recent[recent >= 0].tolist())
        return self._stream

    def _read(self, token: int) -> None:
        start = time.perf_counter()
        if self.speculation:
            self.speculation.read(token, self._max_tokens - len(self.tokens) - 1)
        else:
            self._engine.advance(np.array([token]), self.state)
        self.steps += 1
        self.decode_seconds += time.perf_counter() - start

    def _end(self, reason: str) -> str:
        """The text that was held back, up to a stop string that it may still contain."""
        rest = ""
        if not self._filter.stopped:
            continues = reason == "length" and not self._owns_state
            rest = self._filter.push("" if continues or not self._stream else self._stream.flush())
            if self._filter.stopped:
                reason = "stop"
            else:
                rest += self._filter.flush()
        if not self._owns_state:
            self._engine.require_finite(self.state)
        self.text += rest
        self.finish_reason = reason
        self._release()
        spent = self.prefill_seconds, self.decode_seconds
        _log.debug(
            "text ended: %d + %d tokens, %s, %.3f + %.3f s", self.prompt_tokens, len(self.tokens), reason, *spent
        )
        return rest

    def _release(self) -> None:
        if self._claimed:
            self._claimed = False
            self.state.rows.claimed.discard(self.state.span.start)
