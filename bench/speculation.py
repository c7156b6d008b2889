"""What speculation brings, by how many drafts are right: those of a known text, made wrong at random."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dfssm.runtime import Engine
from dfssm.runtime.speculation import MOST, Draft, Speculation

RATES = (0.0, 0.5, 0.8, 1.0)
"""Probabilities that a draft is right, each for itself."""


def bench_speculation(
    engine: Engine, prompt: int, tokens: int, rounds: int, progress: Callable[[int, int], None]
) -> list[dict]:
    """Each round decodes the same `tokens` tokens after `prompt` others plainly, and once for each of RATES.

    Returns an entry for each rate, with keys as in docs/json.md. DfssmError where the bundle cannot speculate.
    """
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, prompt)
    start, state = engine.new_state(), engine.new_state()
    engine.prefill(ids, start)

    def decode(read: Callable[[int], None]) -> tuple[float, list[int]]:
        """Seconds, and the greedy tokens."""
        state.copy_from(start)
        found = []
        begin = time.perf_counter()
        for _ in range(tokens):
            found.append(int(state.logits[0].argmax()))
            read(found[-1])
        return time.perf_counter() - begin, found

    def plain() -> tuple[float, list[int]]:
        return decode(lambda token: engine.advance(np.array([token]), state))

    _, text = plain()  # which also warms: pages, threads, clocks
    seconds: dict[float, list[float]] = {rate: [] for rate in RATES}
    counts: dict[float, list[Speculation]] = {rate: [] for rate in RATES}
    plain_seconds = []
    for index in range(rounds):
        plain_seconds.append(plain()[0])
        for rate in RATES:
            speculation = Speculation(engine, state, MOST, _forced(text, rate, index, engine.vocab_size))
            taken, found = decode(partial(speculation.read, left=tokens))
            if found != text:
                raise AssertionError(f"speculation chose other tokens: {found} in place of {text}")
            seconds[rate].append(taken)
            counts[rate].append(speculation)
        progress(index + 1, rounds)
    return [
        {
            "right": rate,
            "tok_s": float(tokens / np.median(seconds[rate])),
            "ratio": float(np.median(np.array(plain_seconds) / np.array(seconds[rate]))),
            "tokens_per_run": tokens * rounds / sum(count.runs for count in counts[rate]),
            "drafted": sum(count.drafted for count in counts[rate]),
            "kept": sum(count.kept for count in counts[rate]),
        }
        for rate in RATES
    ]


def _forced(text: Sequence[int], rate: float, seed: int, vocab: int) -> Draft:
    """Drafts of `text`, which is all that is read, each right with probability `rate`."""
    rng = random.Random(seed)

    def draft(ids: Sequence[int], count: int) -> list[int]:
        after = text[len(ids) : len(ids) + count]
        return [token if rng.random() < rate else (token + 1) % vocab for token in after]

    return draft
