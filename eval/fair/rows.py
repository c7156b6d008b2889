"""The rows of the bench: each is made once, kept as JSON, and found again by a run that goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfssm.base.errors import DfssmError
from dfssm.base.files import write_file

FILE = "row.json"

Figures = dict[str, Any]
Found = dict[str, Figures]
"""Name of a row -> its figures."""


@dataclass(frozen=True)
class Row:
    """`name`: of the row's own folder in that of the bench. `setup`: all that decides the figures, as JSON holds it.
    `cost`: its share of the work, in any unit. `make` gets the folder, in which it may find what an earlier run left,
    and the figures of the rows before.
    """

    name: str
    setup: dict[str, Any]
    cost: float
    make: Callable[[Path, Found], Figures]


def run(rows: Sequence[Row], folder: Path, say: Callable[[str], None]) -> Found:
    """The figures of all rows. Each that is made is told, with the time left. Of every row `seconds` is the time that
    this process computed for it, whatever else the machine did.

    Raises DfssmError where `folder` has a row of another setup.
    """
    found = read(rows, folder)
    left = [row for row in rows if row.name not in found]
    begin, done = time.perf_counter(), 0.0
    total = sum(row.cost for row in left)
    for number, row in enumerate(left, 1):
        started = time.process_time()
        (folder / row.name).mkdir(parents=True, exist_ok=True)
        figures = row.make(folder / row.name, found)
        figures = found[row.name] = figures | {"seconds": round(time.process_time() - started, 1)}
        kept = json.dumps({"setup": row.setup, "figures": figures}, indent=1)
        write_file(folder / row.name / FILE, kept + "\n")
        done += row.cost
        minutes = (time.perf_counter() - begin) / done * (total - done) / 60
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float))
        say(f"{row.name}: {shown}; {number} of {len(left)} rows, about {minutes:.0f} min left")
    return found


def read(rows: Sequence[Row], folder: Path) -> Found:
    """Those of the rows that `folder` has."""
    found = {}
    for row in rows:
        file = folder / row.name / FILE
        if file.is_file():
            kept = json.loads(file.read_text())
            if kept["setup"] != json.loads(json.dumps(row.setup)):
                raise DfssmError(f"{file}: was measured with another setup; remove it, or choose another --folder")
            found[row.name] = kept["figures"]
    return found
