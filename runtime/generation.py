"""One run of text generation: prompt in, pieces of text out, with the figures of the run beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dfssm.opset.errors import DfssmError
from dfssm.targets.text import encode

from .sampling import Sampler, Sampling
from .state import State
from .text import StopFilter, TextStream

if TYPE_CHECKING:
    from .engine import Engine


class Generation:
    """Iterator over the pieces of a text; see `Engine.generate`. The prompt is read at the first `next`.

    Attributes, complete when the iteration has ended:
        tokens: the generated ids, without the end-of-text token. text: the pieces joined.
        finish_reason: "length" (max_tokens reached), "eos", "stop" (a stop string) or None (not finished).
        prompt_tokens: how many tokens the prompt had. prefill_seconds: time of reading it.
        steps, decode_seconds: steps of one token after it, and their time with the choice of the token.
        state: having read the prompt and all of `tokens`. When the caller ends the iteration early, the token
            of the last piece has not been read yet. A character of which it has read a part is shown by the
            generation that completes it; only where none can follow is that part shown, as U+FFFD (see `flush`).
    """

    def __init__(
        self,
        engine: Engine,
        prompt: str | np.ndarray,
        max_tokens: int,
        sampling: Sampling,
        stop: list[str],
        ends: set[int],
        state: State | None,
    ):
        if max_tokens < 0:
            raise DfssmError(f"max_tokens is {max_tokens}: give a number >= 0")
        if state is not None and state.batch != 1:
            raise DfssmError(f"generate continues one sequence, the state has {state.batch}: use state.row(i)")
        fresh = state is None or not state.tokens[0]
        if isinstance(prompt, str):
            # Special tokens open a text: they do not belong into the middle of one.
            prompt = np.array(encode(prompt, engine.tokenizer, fresh), np.int64)
        self._prompt = prompt
        self.prompt_tokens = len(self._prompt)
        if fresh and not self.prompt_tokens:
            raise DfssmError("the prompt is empty: give at least one token, or a state to continue from")
        self._engine, self._max_tokens, self._sampler = engine, max_tokens, Sampler(sampling)
        self._tokenizer = engine.tokenizer
        self._ends, self._owns_state = ends, state is None
        self.state = engine.new_state() if state is None else state
        self._stream: TextStream | None = None
        self._filter = StopFilter(stop)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = 0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        if self.prompt_tokens:
            start = time.perf_counter()
            self._engine.prefill(self._prompt, self.state)
            self.prefill_seconds = time.perf_counter() - start
        recent = self.state.recent[0]
        self._stream = stream = TextStream(self._tokenizer, recent[recent >= 0].tolist())
        token = np.zeros(1, np.int64)
        while self.finish_reason is None and len(self.tokens) < self._max_tokens:
            start = time.perf_counter()
            token[0] = self._sampler(self.state.logits[0])
            self.decode_seconds += time.perf_counter() - start
            if int(token[0]) in self._ends:
                self.finish_reason = "eos"
                break
            self.tokens.append(int(token[0]))
            piece = self._filter.push(stream.push(self.tokens[-1]))
            if self._filter.stopped:
                self.finish_reason = "stop"
            if piece:
                self.text += piece
                yield piece
            last = self.finish_reason or len(self.tokens) == self._max_tokens
            if last and self._owns_state:
                break  # nobody will continue from this state: save the step
            start = time.perf_counter()
            self._engine.advance(token, self.state)
            self.steps += 1
            self.decode_seconds += time.perf_counter() - start
        self.finish_reason = self.finish_reason or "length"
        continues = self.finish_reason == "length" and not self._owns_state
        if self.finish_reason != "stop" and (rest := self._end("" if continues else stream.flush())):
            self.text += rest
            yield rest

    def flush(self) -> str:
        """After the iteration, where nothing will go on from the caller's state: the part of a character that the text
        ends in, as U+FFFD.
        """
        rest = self._stream.flush() if self._stream and self.finish_reason != "stop" else ""
        self.text += rest
        return rest

    def _end(self, rest: str) -> str:
        """The text that was held back, and `rest`, up to a stop string that it may still contain."""
        rest = self._filter.push(rest)
        if self._filter.stopped:
            self.finish_reason = "stop"
            return rest
        return rest + self._filter.flush()
