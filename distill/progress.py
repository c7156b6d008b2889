"""What a run shows while it trains: a bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import click
from tqdm import tqdm

from dfssm.base.numbers import duration

LINE_EVERY = 30.0  # seconds from one line to the next


class TrainingProgress:
    """The tokens of a run, of which `done` were trained on before; of several ranks the first one `shows` them."""

    def __init__(self, done: int, shows: bool):
        self.done = self.begun = done
        self.lines = shows and not sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._bar = tqdm(
            initial=done, desc="train", unit="tok", unit_scale=True, mininterval=1.0, dynamic_ncols=True,
            disable=not shows or self.lines,
        )  # fmt: skip

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.close()

    def update(self, done: int, total: int, values: Mapping[str, str]) -> None:
        """`done` of `total` tokens are trained on; `values` are shown beside them."""
        self._bar.total = total
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(done - self.done)
        self.done, now = done, time.monotonic()
        if not self.lines or (now - self._last < LINE_EVERY and done < total):
            return
        self._last = now
        speed = (done - self.begun) / max(now - self._start, 1e-9)
        parts = [f"{done:,} of {total:,} tokens", f"{speed:,.0f} tokens/s"]
        parts += [f"{name} {value}" for name, value in values.items()]
        click.echo(", ".join([*parts, f"{duration((total - done) / max(speed, 1e-9))} left"]), err=True)
