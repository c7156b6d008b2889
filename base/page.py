"""A page of HTML that is complete in itself: no script, no font, nothing to load, light or dark as the reader has it.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d2127; --soft: #626a75; --line: #e3e4e0;
  --s1: #1f6fb5; --s2: #b8521b; --s3: #4d7c2a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1c2025; --ink: #e7e9ec; --soft: #9aa3ae; --line: #30363d;
    --s1: #6fb1f0; --s2: #f0a06a; --s3: #9ccc70; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .7rem; font-size: 1.1rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.soft, figcaption span, th { color: var(--soft); font-weight: normal; }
.tiles { display: grid; gap: .8rem; margin-top: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.tile, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .6rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; padding: .7rem .7rem .3rem; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; margin: 1rem 0 .6rem; }
@media (max-width: 30rem) { .tile b { font-size: 1.15rem; } }
"""

_MAY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # whatever should get into a page


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """The text of a page: its title, which is escaped here; parts of HTML, without the empty ones; more CSS."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_MAY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


def tiles(figures: Mapping[str, str]) -> str:
    """What a figure is of -> the figure: text, escaped here."""
    cells = "".join(
        f'<div class="tile"><b>{escape(figure)}</b><span class="soft">{escape(name)}</span></div>'
        for name, figure in figures.items()
    )
    return f'<div class="tiles">{cells}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Text cells, escaped here; all columns but the first are flush right if they hold `numbers`."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if numbers and i else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    return f'<div class="table"><table>{row("th", head)}{"".join(row("td", cells) for cells in rows)}</table></div>'
