"""Options and output that several subcommands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

from dfssm.targets.trust import VARIABLE

bundle_argument = click.argument("bundle", type=click.Path())
threads_option = click.option(
    "--threads", type=click.IntRange(0), default=0, metavar="N", help="Threads; 0 = one a physical core."
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
    help="Run the code in the bundle: its own library, or an engine from somebody else.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/json.md).")


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; yields what is called with the steps done, and of how many."""
    with tqdm(desc=name, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def print_result(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """`result` as one line of JSON, or as the `text` made of it. Numbers that JSON lacks become null."""
    if as_json:
        click.echo(json.dumps(_finite(result), allow_nan=False))
    else:
        click.echo(text(result))


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
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
