"""What the engine asks of the library that runs the step: a binding of each state, and what a state looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from dfssm.targets import get_target, has_engine
from dfssm.targets.bundle import Manifest

from .state import Layout, State


class Binding(Protocol):
    """The buffers of one state, ready to run. The logits of the last token are in `state.logits` after each run."""

    def feed_token(self, ids: np.ndarray) -> None:
        """Next run reads ids i64[B]."""

    def feed_prompt(self, ids: np.ndarray) -> None:
        """Next run reads ids i64[B,T], contiguous."""

    def run(self, release_memory: bool = False) -> None:
        """Run the step. `release_memory`: keep nothing that only a prompt needs."""

    def run_all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Run ids i64[B,T] and return the logits of all of them, f32[B,T,V]."""

    def pull(self) -> None:
        """Bring the state's arrays up to date, where the state lives elsewhere while it runs."""

    def push(self) -> None:
        """The state's arrays were written: run from them."""


class Backend(Protocol):
    """A bundle's step, opened. `layout` is that of a state of one row, without logits."""

    layout: Layout
    vocab_size: int

    def bind(self, state: State) -> Binding: ...


def open_backend(folder: Path, manifest: Manifest, threads: int) -> Backend:
    """The backend of the bundle's target. DfssmError when it cannot run here."""
    target = get_target(manifest.target)
    if has_engine(target):
        from .cuda import Cuda
        from .tensorrt import TensorRTBackend

        target.check(folder, manifest)
        cuda = Cuda()
        return TensorRTBackend(target.open_engine(folder, manifest), cuda)
    from .ort import OrtBackend

    return OrtBackend(target.open_session(folder, threads=threads), in_place=target.IN_PLACE)
