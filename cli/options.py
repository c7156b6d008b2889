"""Options and output that several commands share."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import click
from tqdm import tqdm

from dfssm.targets.trust import VARIABLE


class Number(click.ParamType):
    """A number from `least` to `most`, both included; `kind` is int or float. NaN is none."""

    def __init__(self, kind: type[int] | type[float], least: float, most: float):
        self.kind, self.least, self.most = kind, least, most
        self.name = "integer" if kind is int else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            found = self.kind(value)
        except ValueError:
            found = math.nan
        if not self.least <= found <= self.most:
            article = "an" if self.kind is int else "a"
            self.fail(f"{value} is not {article} {self.name} from {self.least:,} to {self.most:,}", param, ctx)
        return found


def whole(least: int, most: int = 2**31 - 1) -> Number:
    return Number(int, least, most)


def real(least: float, most: float) -> Number:
    return Number(float, least, most)


class Duration(click.ParamType):
    """Seconds f, written as 300s, 5m or 1.5h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
        if not seconds:
            self.fail(f"{value} is not a time as 300s, 5m or 1.5h", param, ctx)
        return seconds


SEED = whole(0, 2**63 - 1)
THREADS = whole(1, 1024)

bundle_argument = click.argument("bundle", type=click.Path())
threads_option = click.option(
    "--threads", type=whole(0, 1024), default=0, metavar="N", help="CPU threads; 0: one per physical core."
)


def _trust(context: click.Context, _: click.Parameter, value: bool) -> None:
    """For as long as the command runs, and for the processes that it starts."""
    if value:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "1"
        context.call_on_close(
            lambda: os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
        )


trust_option = click.option(
    "--trust",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Run native code that comes with the bundle: its own op library, or an engine built elsewhere.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/json.md).")


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, where that is a terminal, one after the other; yields what is called with the name of the work,
    the steps done, and of how many.
    """
    with ExitStack() as stack:
        bars: dict[str, tqdm] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in bars:
                stack.close()  # the bar before
                bars[name] = stack.enter_context(tqdm(desc=name, total=total, disable=None, leave=False))
            bars[name].update(done - bars[name].n)

        yield progress


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """One such bar."""
    with progress_bars() as progress:
        yield partial(progress, name)


def print_result(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """`result` as one line of JSON, or as the `text` made of it. Numbers that JSON lacks become null."""
    if as_json:
        click.echo(json.dumps(_finite(result), allow_nan=False))
    else:
        click.echo(text(result))


def spread(values: int | Collection[int]) -> str:
    """A number, or from where to where several go."""
    return str(values) if isinstance(values, int) else f"{min(values)} to {max(values)}"


def megabytes(count: float) -> str:
    """Bytes for reading: 155.2 MB (of 10^6 bytes), 12 kB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def table(rows: list[list[str]], right: Collection[int] = ()) -> str:
    """`rows` with aligned columns; those whose index is in `right` are set flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
