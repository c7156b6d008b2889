"""What a file from elsewhere decides, done in a process of its own, bounded in time and memory: a hang, an abort or a
flood there is an error here. Standard library only.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from typing import Any, Self

from .errors import reason

SECONDS = 10.0
"""Of one request, of the processor's time: on a busy machine it may take longer by the clock."""

WAIT = 120.0
"""Seconds of one request by the clock: of one that waits for something."""

MEMORY = 4 << 30
"""Bytes of address space."""


ANSWER = 64 << 20
"""Bytes of an answer, as JSON."""


def python(*arguments: str) -> list[str]:
    """The command that runs Python with `arguments`. Modules of the working directory, which may be anybody's, are not
    imported.
    """
    return [sys.executable, "-P", *arguments]


class ChildError(Exception):
    """A request that was not answered; the message says why."""


def possible() -> bool:
    """Whether there is a Python to start: none where it is embedded in another program."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class Child:
    """A process that answers requests by `function` of `module`, from what JSON holds to what JSON holds. It ends with
    the `with` block, with this object or this process, or with a request that is over its bounds; the next one starts
    another. For one thread at a time.
    """

    def __init__(self, module: str, function: str):
        self._process: subprocess.Popen[bytes] | None = None
        call = f"serve({module!r}, {function!r}, {SECONDS}, {WAIT})"
        # The same modules as here, and none of the working directory.
        self._code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; {call}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._wait()

    __del__ = close

    def ask(self, request: Any) -> Any:
        """The answer. ChildError with what the function raised, or with how the process ended."""
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    python("-c", self._code),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"RAYON_NUM_THREADS": "1"},  # each thread of tokenizers would take address space
                )
            except OSError as error:
                raise ChildError(f"no process can be started to try it: {error.strerror}") from None
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # Ctrl-C: the next request is not to get this one's answer
            self.close()
            raise
        if not answer:
            status = self._wait()
            if -status in (signal.SIGPROF, signal.SIGALRM):
                raise ChildError(f"it takes more than {SECONDS if status == -signal.SIGPROF else WAIT:.0f} s")
            ended = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise ChildError(f"it ends the process that tries it: {ended}")
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise ChildError(result["error"])
        return result["answer"]

    def _wait(self) -> int:
        process, self._process = self._process, None
        assert process and process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
        return process.wait()


def serve(module: str, function: str, seconds: float, wait: float) -> None:
    """The process: a line of JSON a request, a line an answer."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, wait)}
    for number in timers:
        signal.signal(number, signal.SIG_DFL)  # it ends the process, whatever code that is in
    signal.pthread_sigmask(signal.SIG_UNBLOCK, timers)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    answer = getattr(importlib.import_module(module), function)
    for line in sys.stdin.buffer:
        for timer, limit in timers.values():
            signal.setitimer(timer, limit)
        try:
            text = json.dumps({"answer": answer(json.loads(line))})
            if len(text) > ANSWER:
                raise ValueError(f"its answer has {len(text)} bytes")
        except Exception as error:
            text = json.dumps({"error": reason(error)})
        answers.write(text.encode() + b"\n")
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        answers.flush()
