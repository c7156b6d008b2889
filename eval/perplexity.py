"""Perplexity over strided windows of one text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dfssm.opset.errors import DfssmError

from .scorer import BATCH, Scorer, score
from .text import Text


@dataclass(frozen=True)
class Perplexity:
    """`nats`: negative log-likelihood of `tokens` tokens, summed in fp64; `bytes`: of the text that they are."""

    nats: float
    tokens: int
    bytes: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats / self.tokens))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop): the model reads tokens [start, stop) from a zero state, [first, stop) are scored.

    A window begins every `stride` tokens. Each token but 0 is scored once, after at least window - stride tokens of
    its window, or all tokens before it where there are fewer.
    """
    start, first, stop = 0, 1, min(window, tokens)
    while first < tokens:
        yield start, first, stop
        start, first, stop = start + stride, stop, min(start + stride + window, tokens)


def require_stride(window: int, stride: int) -> None:
    """DfssmError unless 1 <= stride < window: otherwise the first token of a window would have nothing before it."""
    if window < 2:
        raise DfssmError(f"window is {window}: give at least 2 tokens, one to read and one to score")
    if not 1 <= stride < window:
        raise DfssmError(f"stride is {stride} and window {window}: give a stride from 1 to {window - 1}")


def measure(
    scorer: Scorer,
    text: Text,
    window: int = 1024,
    stride: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Score `text`; `progress` gets the number of tokens scored since its last call.

    DfssmError as `require_stride`.
    """
    require_stride(window, stride)
    nats, batch = 0.0, min(BATCH, scorer.max_batch)
    # Windows of one shape run together: all but the first and the last.
    for (skip, _), alike in groupby(windows(len(text.ids), window, stride), lambda w: (w[1] - w[0] - 1, w[2] - w[1])):
        alike = list(alike)
        for begin in range(0, len(alike), batch):
            rows = np.stack([text.ids[start:stop] for start, _, stop in alike[begin : begin + batch]])
            state = scorer.new_state(len(rows))
            if skip:
                _, state = scorer.read(np.ascontiguousarray(rows[:, :skip]), state)
            found, _ = score(scorer, rows[:, skip:-1], rows[:, skip + 1 :], state)
            nats -= float(found.sum())
            progress(found.size)
    return Perplexity(nats, len(text.ids) - 1, text.scored_bytes, window, stride)
