"""What the engine asks of the library that runs the step: memory for states, and runs on rows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from .sampler import Sampler
from .sampling import Sampling, choose_each
from .state import Layout, State


class Ahead(Protocol):
    """One row of a pool that reads drafts of its next tokens, and keeps those that turn out right. Bit for bit, the row
    is at any time what it would be had it read what it keeps token by token.
    """

    def run(self, ids: Sequence[int], done: Callable[[], object]) -> int:
        """Read ids[0], then as many of the others, which are drafts, as a run takes: returns how many those are. The
        row keeps ids[0]; `logits` are those after it, `done` as in `Pool.run`.
        """

    @property
    def draft(self) -> int | None:
        """The first draft of the last run that the row does not keep; None where there is none."""

    def keep(self) -> None:
        """The row keeps that one, too; `logits` are those after it."""


class Pool(Protocol):
    """Resident memory of the states of so many sequences, a row each, and the runs on it. A batch is a range of rows;
    what touches one row leaves the others as they are.
    """

    on_host: bool
    """Whether the logits are made in the memory of `logits`: a device has them elsewhere, and brings what is asked."""

    @property
    def logits(self) -> np.ndarray:
        """f32[rows,V], those of the last token of each row; the host's copy of them, brought up to date."""

    def run(self, ids: np.ndarray, start: int, done: Callable[[], object], release_memory: bool = False) -> None:
        """Read ids i64[n,T], contiguous, into rows `start` to `start + n - 1`; then `logits` has theirs.

        `done` is called when all of that is written, also where Ctrl-C came meanwhile, which is raised after it; where
        it is not called, the rows are broken. `release_memory`: keep nothing that only a prompt needs.
        """

    def run_all_logits(self, ids: np.ndarray, start: int, done: Callable[[], object]) -> np.ndarray:
        """`run` that returns the logits of all tokens, f32[n,T,V]; T is at most the backend's `max_logits`."""

    def ahead(self, row: int) -> Ahead:
        """Row `row`, to read ahead. DfssmError where a run of several tokens has not the bits of runs of one."""

    def logits_of(self, row: int) -> np.ndarray:
        """f32[V], those of row `row` alone, which a device copies to the host."""

    def largest(self, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`sampling.largest` of the logits of row `row`. A device that is asked for so many finds them itself from the
        next step on, and the logits stay there.
        """

    def weighed(self, row: int, temperature: float) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Of the logits of row `row`: the largest, as `largest`, as many as a device finds, and the `total_weight` of
        all by this temperature. None where the host has them all, and of a device that is first asked for it.
        """

    def reset(self, row: int) -> None:
        """Row `row` has read nothing: its state and logits are zeros."""

    def copy(self, source: int, to: int) -> None:
        """Row `to` becomes row `source`, logits included."""

    def read(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the state of row `row` to contiguous arrays [1,...], by the names of the graph's inputs."""

    def write(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        """The state of row `row` becomes that of such arrays."""

    def pull(self) -> None:
        """Bring the arrays of the `State` that the pool was made of up to date, where they are copies."""

    def pull_logits(self) -> None:
        """Bring the logits of that `State` up to date, likewise."""

    def push(self) -> None:
        """These arrays were written: run from them."""


class Backend(Protocol):
    """A bundle's step, opened. `layout` is that of a state of one row, without logits; `max_batch` the most rows of a
    run, `max_tokens` the tokens of each by which a prompt is read, and `max_logits` where all their logits are wanted.
    `d_model` is None where it does not show.
    """

    layout: Layout
    vocab_size: int
    d_model: int | None
    max_batch: int
    max_tokens: int
    max_logits: int

    def pool(self, rows: int) -> Pool:
        """Memory for `rows` sequences that have read nothing."""

    def bind(self, state: State) -> Pool:
        """A pool of the rows of `state`, which works in its arrays or keeps them as copies."""


def choose(
    pool: Pool, rows: Sequence[int], samplers: Sequence[Sampler], positions: Sequence[int]
) -> list[tuple[int, float] | Exception]:
    """The token that each of `samplers` takes after so many tokens that its row has read, and its logit, or what it
    raised.
    """
    together = [at for at, sampler in enumerate(samplers) if not sampler.needs_logits] if pool.on_host else []
    if together and len(together) == len(rows):  # no more steps than it takes: this is Python between two runs
        return _choose_together(pool, rows, samplers, positions)
    found: dict[int, tuple[int, float] | Exception] = {}
    if together:
        of_rows, of_texts = [rows[at] for at in together], [samplers[at] for at in together]
        chosen = _choose_together(pool, of_rows, of_texts, [positions[at] for at in together])
        found |= zip(together, chosen, strict=True)
    return [
        found[at] if at in found else _choose_alone(pool, row, sampler, position)
        for at, (row, sampler, position) in enumerate(zip(rows, samplers, positions, strict=True))
    ]


def _choose_together(
    pool: Pool, rows: Sequence[int], samplers: Sequence[Sampler], positions: Sequence[int]
) -> list[tuple[int, float] | Exception]:
    """By the logits of several rows, on the host."""
    first, count = rows[0], len(rows)
    beside = all(row == first + at for at, row in enumerate(rows))
    logits = pool.logits[first : first + count] if beside else pool.logits[list(rows)]
    tokens = choose_each([sampler.sampling for sampler in samplers], logits, positions)
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.add(token)
    return list(zip(tokens, logits[range(count), tokens].tolist(), strict=True))


def _choose_alone(pool: Pool, row: int, sampler: Sampler, position: int) -> tuple[int, float] | Exception:
    try:
        return _choose(pool, row, sampler, position)
    except Exception as error:  # of a processor, say
        return error


def _choose(pool: Pool, row: int, sampler: Sampler, position: int) -> tuple[int, float]:
    if sampler.needs_logits:
        logits = pool.logits_of(row)
        token = sampler.choose(logits, position)
        return token, float(logits[token])
    token, logit = _choose_on_device(pool, row, sampler.sampling, position)
    sampler.add(token)
    return token, logit


def _choose_on_device(pool: Pool, row: int, sampling: Sampling, position: int) -> tuple[int, float]:
    """A device may keep the logits."""
    bits = sampling.random_bits(position)
    if sampling.count:
        tokens, logits = pool.largest(row, sampling.count)
        at = sampling.choose_among(logits, bits)
        assert at is not None
        return int(tokens[at]), float(logits[at])
    if found := pool.weighed(row, sampling.temperature):
        tokens, logits, total = found
        at = sampling.choose_among(logits, bits, total)
        if at is not None:
            return int(tokens[at]), float(logits[at])
    logits = pool.logits_of(row)
    token = sampling.choose_by(logits, bits)
    return token, float(logits[token])
