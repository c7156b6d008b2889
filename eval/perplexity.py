"""Perplexity over strided windows of one text, and the divergence from a model that says what it should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dfssm.base.errors import DfssmError

from .scorer import BATCH, CHUNK, Scorer, log_probs, read_chunks
from .text import Text


@dataclass(frozen=True)
class Against:
    """How far a model is from a reference over the same tokens.

    `nats`: negative log-likelihood by the reference. `kl`: mean of KL(reference || model), nats a token, and
    `kl_stderr`, its standard error. `same_top`: share of the tokens where both hold the same one for the likeliest.
    """

    nats: float
    kl: float
    kl_stderr: float
    same_top: float


@dataclass(frozen=True)
class Perplexity:
    """`nats`: negative log-likelihood of `tokens` tokens, summed in fp64; `bytes`: of the text that they are."""

    nats: float
    tokens: int
    bytes: int
    window: int
    stride: int
    chunk: int
    against: Against | None = None

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
    reference: Scorer | None = None,
    chunk: int = CHUNK,
) -> Perplexity:
    """Score `text`; `progress` gets the number of tokens scored since its last call.

    What a window reads before it scores is one run, what it scores are runs of `chunk` tokens: at the end of each a
    narrow state is rounded, with chunk = 1 as in decoding. With a `reference` the result is `against` it, too.
    DfssmError as `require_stride`, and where the two models do not have the same tokens.
    """
    require_stride(window, stride)
    models = [scorer] if reference is None else [scorer, reference]
    if len({model.vocab_size for model in models}) > 1:
        sizes = " and ".join(str(model.vocab_size) for model in models)
        raise DfssmError(f"model and reference have {sizes} tokens: give a reference with the same ones")
    batch = min(BATCH, *(model.max_batch for model in models))
    nats, divergences, same = [0.0] * len(models), [], 0
    for pieces in zip(*(_pieces(model, text, window, stride, batch, chunk) for model in models), strict=True):
        for i, (targets, logits) in enumerate(pieces):
            nats[i] -= float(log_probs(logits, targets)[0].sum())
        if reference:
            (_, logits), (_, wanted) = pieces
            divergences.append(divergence(wanted, logits).ravel())
            same += int((wanted.argmax(-1) == logits.argmax(-1)).sum())
        progress(pieces[0][0].size)
    tokens, against = len(text.ids) - 1, None
    if reference:
        kl = np.concatenate(divergences)
        error = float(kl.std(ddof=1)) / math.sqrt(tokens) if tokens > 1 else math.nan
        against = Against(nats[1], float(kl.mean()), error, same / tokens)
    return Perplexity(nats[0], tokens, text.scored_bytes, window, stride, chunk, against)


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || model), nats f64[...], of the distributions that two logits f32[...,V] give.

    Logarithms and terms are fp32, sums over the vocabulary fp64.
    """
    log_q, log_p = (_log_softmax(x) for x in (reference, logits))
    return (np.exp(log_q) * (log_q - log_p)).sum(-1, dtype=np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _pieces(
    scorer: Scorer, text: Text, window: int, stride: int, batch: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All tokens to be scored, some at a time: targets i64[B,t] and the logits f32[B,t,V] that are to predict them."""
    # Windows of one shape run together: all but the first and the last.
    for (skip, _), group in groupby(windows(len(text.ids), window, stride), lambda w: (w[1] - w[0] - 1, w[2] - w[1])):
        alike = list(group)
        for begin in range(0, len(alike), batch):
            rows = np.stack([text.ids[start:stop] for start, _, stop in alike[begin : begin + batch]])
            state = scorer.new_state(len(rows))
            if skip:
                _, state = scorer.read(np.ascontiguousarray(rows[:, :skip]), state)
            targets = rows[:, skip + 1 :]
            for part, logits in read_chunks(scorer, rows[:, skip:-1], state, chunk):
                yield targets[:, part], logits
