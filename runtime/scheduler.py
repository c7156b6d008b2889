"""Continuous batching: many texts made at a time, each as it is made alone."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from dfssm.base.errors import DfssmError
from dfssm.base.numbers import require_whole
from dfssm.targets.text import encode

from .generation import GenerationConfig
from .prefix_cache import PrefixCache, size
from .request import Request

if TYPE_CHECKING:
    from .engine import Engine, Tokens


STATES = 16
"""How many states the prefix cache has room for, where nothing else is said."""


class QueueFull(DfssmError):
    """As many requests wait as may: there is room later."""


class Scheduler:
    """Makes up to `slots` texts at a time; up to `queue` others wait, and the first to come is the first to begin.

    A round (`step`) reads a piece of a prompt, of as many tokens as the engine reads at once, then the last token of
    every text whose prompt has been read, as one batch. Prompts take turns by pieces, so that neither a long prompt nor
    many short ones hold the others up. Each text is that of `Engine.generate`, bit for bit, whatever runs beside it.

    In a `with` block the rounds run in a thread of their own; without one, call `step`. Any thread may submit.

    Args: `prefix_cache`: bytes of states of prompts' beginnings (`PrefixCache`); None: room for `STATES` of them.
    Attributes: `read`, `reused`: how many tokens of prompts were read, and how many the prefix cache had. `written`:
        how many tokens were chosen.
    Raises DfssmError for a number out of range: an engine may run fewer rows than `slots`.
    """

    def __init__(self, engine: Engine, slots: int = 8, queue: int = 64, prefix_cache: int | None = None):
        require_whole("slots", slots, 1, engine.backend.max_batch, "rows of a batch")
        require_whole("queue", queue, 1)
        state = size(engine.new_state())
        prefix_cache = STATES * state if prefix_cache is None else prefix_cache
        require_whole("prefix_cache", prefix_cache, meaning="bytes")
        if 0 < prefix_cache < state:
            raise DfssmError(f"prefix_cache is {prefix_cache}: one state takes {state} bytes, give more, or 0 for none")
        self.engine, self.queue, self.slots, self.piece = engine, queue, engine.slots(slots), engine.backend.max_tokens
        self.cache = PrefixCache(engine.model, self.piece, prefix_cache)
        self.read = self.reused = self.written = 0
        self._waiting: list[Request] = []
        self._reading: list[Request] = []  # their prompts; the first one is next
        self._writing: list[Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def open(self) -> bool:
        """Whether it takes requests, and its thread runs."""
        return not self._closed and self._thread is not None

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many have one."""
        return len(self.slots)

    def submit(
        self,
        prompt: str | Tokens,
        config: GenerationConfig = GenerationConfig(),  # noqa: B008 (it is frozen)
        *,
        notify: Callable[[], object] | None = None,
        **options: Any,
    ) -> Request:
        """Ask for a text, as from `Engine.generate`.

        Args: `options`: fields of `GenerationConfig` that are not as in `config`. `notify` is called in the scheduler's
            thread when there is more of the text and when it has ended; it must neither wait nor raise. It is for those
            who look at the request's attributes; others iterate.
        Raises what `Engine.generate` does, QueueFull where `queue` requests wait, and DfssmError after `close`.
        """
        ids = self.engine.token_ids(encode(prompt, self.engine.tokenizer) if isinstance(prompt, str) else prompt)
        if ids.ndim != 1 or not len(ids):
            raise DfssmError(f"the prompt is tokens {list(ids.shape)}: give a text, or a list of one token or more")
        config = dataclasses.replace(config, **options)
        request = Request(self.engine, ids, config, self.cache.keys(ids), notify)
        with self._changed:
            if self._closed:
                raise DfssmError("the scheduler is closed: make another one")
            if len(self._waiting) >= self.queue:
                raise QueueFull(f"{self.queue} requests are waiting: try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def step(self) -> bool:
        """One round. Returns whether there is more to do."""
        self._obey()
        self._admit()
        self._read_prompts()
        self._write()
        return bool(self._waiting or self._reading or self._writing)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="dfssm-scheduler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, seconds: float = 0) -> None:
        """Take no more requests, give those that are there so many seconds to end, and cancel what is left."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread:
            self._thread.join(seconds)
        for request in self._all():
            request.cancel()
        if self._thread:
            self._thread.join()
        else:
            self._obey()

    def _run(self) -> None:
        more = False
        try:
            while True:
                with self._changed:
                    if not more:
                        self._changed.wait_for(lambda: self._waiting or self._closed)
                        if not self._waiting:
                            return
                more = self.step()
        finally:  # where that is a bug, nobody is to wait for what will not come
            self._closed = True
            for request in self._all():
                request.end("error", DfssmError("the scheduler has ended by an error: make another one"))

    def _all(self) -> list[Request]:
        with self._changed:
            return [*self._waiting, *self._reading, *self._writing]

    def _obey(self) -> None:
        """Cancel and rewind what is to be."""
        for request in self._all():
            if request.cancelled:
                self._end(request, "cancelled")
            elif request.back:
                request.go_back()
                if request.slot:
                    self._drop(request)
                    self.slots.reset(request.slot)
                    self._begin(request)

    def _admit(self) -> None:
        """Give slots to those that wait. A prompt that begins as one that is being read waits for what they share."""
        for request in list(self._waiting):
            if len(self.slots) == self.slots.capacity:
                return
            if not self._is_being_read(request):
                self._drop(request)
                request.keep |= self.cache.worth(request.keys)
                request.slot = self.slots.join()
                self._begin(request)

    def _is_being_read(self, request: Request) -> bool:
        """Whether another reads more of its prompt than is in the cache, which is then to get that."""
        cached = self.cache.find(request.keys)[0]
        for other in self._reading:
            shared = max((length for length, _ in set(request.keys) & set(other.keys)), default=0)
            if shared > max(cached, other.read):
                other.keep.add(shared)
                return True
        return False

    def _begin(self, request: Request) -> None:
        """Its slot has read nothing: it goes on from what is in the cache."""
        with self._failing(request):
            cached, state = self.cache.find(request.keys)
            if state:
                assert request.slot
                self.slots.load(request.slot, state)
                self.reused += cached
            request.cached_tokens = cached
            self._place(request)

    def _place(self, request: Request) -> None:
        """It reads on, or has read all that it has."""
        if request.read < request.known:
            self._reading.append(request)
        elif request.complete:
            self._end(request, "length")
        else:
            self._writing.append(request)
            self._choose([request])

    def _read_prompts(self) -> None:
        """Read the next piece of the prompt whose turn it is, and with it those of prompts in the rows beside it that
        are as long, up to as many tokens as a piece may have.
        """
        if not self._reading:
            return
        first = self._reading[0]
        length = first.run_length(self.piece)
        alike = {request.row: request for request in self._reading if request.run_length(self.piece) == length}
        start, stop, most = first.row, first.row + 1, self.piece // length
        while stop in alike and stop - start < most:
            stop += 1
        while start - 1 in alike and stop - start < most:
            start -= 1
        for request in self._run_batch([alike[row] for row in range(start, stop)], length):
            self._drop(request)
            self.read += length
            with self._failing(request):
                self._keep(request)
                self._place(request)

    def _write(self) -> None:
        """Read the last token of every text, and choose its next."""
        self._choose(self._run_batch(side_by_side(self._writing), 1))

    def _run_batch(self, requests: list[Request], length: int) -> list[Request]:
        """Read the next `length` tokens of each. Returns them, or none where the run failed."""
        if requests:
            with self._failing(*requests):
                slots = [request.slot for request in requests if request.slot]  # all of them
                self.slots.read(slots, [request.next(length) for request in requests])
                return requests
        return []

    def _choose(self, requests: list[Request]) -> None:
        """Take the next token of each."""
        slots = [request.slot for request in requests if request.slot]  # all of them
        tokens = self.slots.next(slots, [request.sampler for request in requests])
        for request, token in zip(requests, tokens, strict=True):
            if isinstance(token, Exception):
                self._end(request, "error", token)
                continue
            with self._failing(request):
                if reason := request.take(token):
                    self._end(request, reason)
                else:
                    self.written += 1

    def _keep(self, request: Request) -> None:
        """Put its state into the cache, if it is of use there."""
        key = next((key for key in request.keys if key[0] == request.read and key[0] in request.keep), None)
        if key and key not in self.cache:
            assert request.slot
            state = self.engine.new_state()
            self.slots.save(request.slot, state)
            self.cache.put(key, state)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        self._drop(request)
        if request.slot:
            self.slots.leave(request.slot)
            request.slot = None
        request.end(reason, error)

    def _drop(self, request: Request) -> None:
        with self._changed:
            for group in (self._waiting, self._reading, self._writing):
                if request in group:
                    group.remove(request)

    def _failing(self, *requests: Request) -> _Failing:
        """What is raised in the `with` block ends these requests, and no others."""
        return _Failing(self, requests)


class _Failing:
    """Of `Scheduler._failing`. No `contextmanager`: that takes three times as long, and there is a block a token."""

    __slots__ = ("_requests", "_scheduler")

    def __init__(self, scheduler: Scheduler, requests: tuple[Request, ...]):
        self._scheduler, self._requests = scheduler, requests

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        for request in self._requests:
            self._scheduler._end(request, "error", error)
        return True


def side_by_side(requests: list[Request]) -> list[Request]:
    """These in the order of rows in which the fewest move: none, where they lie in a range of rows."""
    requests = sorted(requests, key=lambda request: request.row)
    count = len(requests)
    if not count or requests[-1].row - requests[0].row == count - 1:
        return requests
    there = {request.row: request for request in requests}
    others = (request for request in requests if request.row >= count)
    return [there.get(row) or next(others) for row in range(count)]
