"""What the engine asks of the library that runs the step: memory for states, and runs on rows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from dfssm.targets import get_target, has_engine
from dfssm.targets.bundle import Bundle
from dfssm.targets.trust import own_library

from .config import require_config
from .sampler import Sampler
from .sampling import Sampling
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


def choose(pool: Pool, row: int, sampler: Sampler, position: int) -> tuple[int, float]:
    """The token that `sampler` takes after the `position` tokens that row `row` has read, and its logit."""
    if sampler.needs_logits:
        logits = pool.logits_of(row)
        token = sampler.choose(logits, position)
        return token, float(logits[token])
    token, logit = _choose(pool, row, sampler.sampling, position)
    sampler.add(token)
    return token, logit


def _choose(pool: Pool, row: int, sampling: Sampling, position: int) -> tuple[int, float]:
    """Where a device may keep the logits."""
    if sampling.count:
        tokens, logits = pool.largest(row, sampling.count)
        at = sampling.choose_among(logits, position)
        assert at is not None
        return int(tokens[at]), float(logits[at])
    if found := pool.weighed(row, sampling.temperature):
        tokens, logits, total = found
        at = sampling.choose_among(logits, position, total)
        if at is not None:
            return int(tokens[at]), float(logits[at])
    logits = pool.logits_of(row)
    token = sampling.choose(logits, position)
    return token, float(logits[token])


def open_backend(bundle: Bundle, threads: int, trust: bool = False, mmap: bool = True) -> Backend:
    """The backend of the bundle's target. DfssmError when it cannot run here, holds code that is not trusted, or is not
    what its manifest says.
    """
    target = get_target(bundle.manifest.target)
    own = own_library(bundle, target.LIBRARY, trust)
    backend: Backend
    if has_engine(target):
        from .cuda import Cuda
        from .tensorrt import TensorRTBackend

        target.check(bundle.folder, bundle.manifest, own)
        cuda = Cuda(target.plugin_library(bundle.manifest.engine, own))
        with cuda.device():
            opened = target.open_engine(bundle, bundle.manifest, own, trust)
        backend = TensorRTBackend(opened, cuda, in_place=bundle.manifest.engine["lowering"] == "plugin")
    else:
        from .ort import OrtBackend

        session = target.open_session(bundle, threads=threads, own=own, mmap=mmap)
        backend = OrtBackend(session, in_place=target.IN_PLACE)
    require_config(bundle.folder, bundle.manifest, backend)
    return backend
