"""What a peer is to the benchmark: two functions that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Peer:
    """A model of random weights, opened. Both functions begin with a state that has read nothing.

    `decode(n)` and `prefill(n)`: seconds of n steps, of reading a prompt of n tokens. `options`: how it was built and
    opened, in a line. `close` ends it. What they compute is checked to be finite, and fails where it is not.
    """

    decode: Callable[[int], float]
    prefill: Callable[[int], float]
    options: str
    close: Callable[[], object] = lambda: None
