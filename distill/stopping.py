"""SIGTERM, as schedulers of clusters and service managers send it: a run saves itself, then ends."""

from __future__ import annotations

import signal
import threading
from types import TracebackType


class Stopping:
    """In the `with` block SIGTERM only sets `asked`; at its end it is what it was before. In the main thread only."""

    def __init__(self) -> None:
        self.asked = False
        self._before: object = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type] # what signal() gave
            self._before = None

    def end(self) -> None:
        """End as if SIGTERM came now."""
        self.__exit__(None, None, None)
        signal.raise_signal(signal.SIGTERM)
