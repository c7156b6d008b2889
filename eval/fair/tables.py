"""Figures of several seeds as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from dfssm.base.markdown import table

from .rows import Figures, Found


def spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and the standard deviation where there are several values."""
    mean = text(statistics.mean(values))
    return f"{mean} ± {text(statistics.stdev(values))}" if len(values) > 1 else mean


def of_seeds(found: Found, section: str, name: str) -> list[Figures]:
    """The figures of the row SECTION/seed-N/`name`, of every seed that has it."""
    return [figures for row, figures in found.items() if row.startswith(f"{section}/") and row.endswith(f"/{name}")]


def number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def percent(value: float) -> str:
    """The share 0.5: 50.0 %."""
    return f"{100 * value:.1f} %"


def of_models(
    found: Found, section: str, titles: Mapping[str, str], columns: Mapping[str, tuple[str, Callable[[float], str]]]
) -> str:
    """A table with a line for each model of a section, "not run" where no seed has it.

    `titles`: the name of a row -> the model in words. `columns`: the heading of a figure -> its key, and how one is
    written. The seeds measured and the tokens trained on come before.
    """
    lines = []
    for name, title in titles.items():
        seeds = of_seeds(found, section, name)
        if seeds:
            tokens = seeds[0]["tokens"]
            shown = [spread([figures[key] for figures in seeds], text) for key, text in columns.values()]
            lines.append([title, str(len(seeds)), f"{tokens:,}", f"{tokens / seeds[0]['weights']:.2f}", *shown])
        else:
            lines.append([title, *["not run"] * (3 + len(columns))])
    return table(["model", "seeds", "tokens", "tokens a weight", *columns], lines)
