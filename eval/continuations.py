"""Log-likelihoods of continuations: a context is read once, and its state cloned for each of its continuations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from .scorer import BATCH, Scorer, log_probs, score

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids: a context of at least one, and what follows it."""


def score_continuations(
    scorer: Scorer,
    requests: Sequence[Request],
    batch: int = BATCH,
    progress: Callable[[int], None] = lambda requests: None,
) -> list[tuple[float, bool]]:
    """For each request the log-probability of the continuation, and whether greedy decoding would give it.

    Exact: contexts of one length run together, so none is padded; continuations are padded at their end, which
    comes after all that is scored. `progress` gets the number of requests done since its last call.
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # what an empty continuation has
    batch = min(batch, scorer.max_batch)
    after = defaultdict(list)  # context -> the requests that begin with it
    for index, (context, continuation) in enumerate(requests):
        if len(continuation):
            after[tuple(context)].append(index)
    progress(len(requests) - sum(map(len, after.values())))
    for contexts in _of_one_length(after, batch):
        logits, state = scorer.read(np.array(contexts, np.int64), scorer.new_state(len(contexts)))
        jobs = [(row, index) for row, context in enumerate(contexts) for index in after[context]]
        jobs.sort(key=lambda job: len(requests[job[1]][1]))  # little padding
        for begin in range(0, len(jobs), batch):
            rows, indices = zip(*jobs[begin : begin + batch], strict=True)
            found = _score_after(scorer, logits[list(rows)], state, rows, [requests[i][1] for i in indices])
            for index, result in zip(indices, found, strict=True):
                results[index] = result
            progress(len(indices))
    return results


def _of_one_length(contexts: Iterable[tuple[int, ...]], batch: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of contexts of equal lengths, the longest first: what needs the most memory and time comes first."""
    for _, group in groupby(sorted(contexts, key=len, reverse=True), key=len):
        alike = list(group)
        yield from (alike[begin : begin + batch] for begin in range(0, len(alike), batch))


def _score_after(
    scorer: Scorer, logits: np.ndarray, state: object, rows: Sequence[int], continuations: list[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Continuations of the states `rows`, whose last tokens gave logits f32[B,V]."""
    longest = max(map(len, continuations))
    ids = np.zeros((len(rows), longest), np.int64)
    real = np.zeros(ids.shape, bool)
    for row, continuation in enumerate(continuations):
        ids[row, : len(continuation)], real[row, : len(continuation)] = continuation, True
    found, likeliest = np.empty(ids.shape), np.empty(ids.shape, bool)
    found[:, 0], likeliest[:, 0] = log_probs(logits, ids[:, 0])
    if longest > 1:
        found[:, 1:], likeliest[:, 1:] = score(scorer, ids[:, :-1], ids[:, 1:], scorer.select(state, rows))
    return [(float(f[r].sum()), bool(g[r].all())) for f, g, r in zip(found, likeliest, real, strict=True)]
