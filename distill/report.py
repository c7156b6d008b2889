"""The report page of a run: one HTML file from log.jsonl and result.json, complete in itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfssm.opset.files import write_file
from dfssm.opset.numbers import duration

from .chart import Chart, Point, Series, label, svg

FORMS = {
    "teacher": "teacher",
    "data_free": "data-free conversion",
    "student": "student, as shipped",
    "as_trained": "student, as trained",
    "float_low_rank": "student with a float low rank",
    "float_embedding": "student with a float embedding",
}

_STYLE = """
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
p { margin: .3rem 0; }
.soft, figcaption span, th { color: var(--soft); font-weight: normal; }
.tiles, .charts { display: grid; gap: .8rem; margin-top: 1.2rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
section.charts { margin-top: 2rem; }
.charts { margin-top: 0; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.tile, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .6rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; padding: .7rem .7rem .3rem; }
figcaption { font-weight: 600; }
figcaption i { display: inline-block; width: 1.1em; height: 3px; margin: 0 .3em .25em .8em; border-radius: 2px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg path { fill: none; }
.grid { stroke: var(--line); }
.line { stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .35; }
.reference { stroke: var(--soft); stroke-dasharray: 5 4; }
.s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.line { stroke: currentColor; } .dot { fill: currentColor; } i { background: currentColor; }
.line.s2 { stroke-dasharray: 7 5; } .line.s3 { stroke-dasharray: 1 5; } .line.faint { stroke-dasharray: none; }
@media (max-width: 30rem) { svg text { font-size: 14px; } .tile b { font-size: 1.15rem; } }
.table { overflow-x: auto; max-width: 44rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; margin: 1rem 0 .6rem; }
"""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from the log.jsonl and result.json of a run that ended; return its path.

    Raises DfssmError if the page cannot be written.
    """
    path, log = folder / "report.html", (folder / "log.jsonl").read_text(encoding="utf-8")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    text = page(folder.resolve().name, [json.loads(line) for line in log.splitlines()], result)
    write_file(path, text.encode(errors="replace"))  # names of folders need not be UTF-8
    return path


def page(name: str, log: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    """The page of the run called `name`."""
    teacher = result["perplexity"].get("teacher")
    body = [
        f"<h1>{escape(name)}</h1>",
        '<p class="soft">Distillation of a 1-bit student</p>',
        _tiles(result, teacher),
        _perplexity_table(result, teacher),
        _charts(log, teacher),
        '<div class="charts">',
        *(_options(title, result[title.lower()]) for title in ("Recipe", "Schedule")),
        "</div>",
        _evaluations(log, teacher),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: distillation</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


def series(log: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """The finite values of `key` over tokens."""
    return [(line["tokens"], line[key]) for line in log if key in line and math.isfinite(line[key])]


def _charts(log: Sequence[dict[str, Any]], teacher: float | None) -> str:
    parts = [("loss", "loss")] + ([("KL", "kl"), ("hidden", "hidden")] if series(log, "hidden") else [])
    losses = [Series(name, series(log, key), noisy=True) for name, key in parts]
    groups = [(name, f"grad_norm_{name}") for name in ("scaffold", "low_rank", "float")]
    norms = [Series(name.replace("_", " "), series(log, key), noisy=True) for name, key in groups if series(log, key)]
    blend = series(log, "blend")
    charts = [
        Chart("Held-out KL", "nats per token", [Series("student", series(log, "held_out_kl"), dots=True)], log=True),
        Chart("Training loss", "nats per token", losses, log=True),
        Chart(
            "Held-out perplexity",
            "of the student in training",
            [Series("student", series(log, "perplexity"), dots=True)],
            None if teacher is None else ("teacher", teacher),
            log=True,
        ),
        Chart("Same top token", "share of tokens",
              [Series("student", series(log, "held_out_same_top"), dots=True)], shows=(0, 1)),
        Chart("Flipped signs", "share", [Series("flipped", series(log, "flipped"))], shows=(0,)),
        # Most recipes anneal nothing.
        Chart("Annealing", "share of quantised weights",
              [Series("blend", blend if any(b < 1 for _, b in blend) else [])], shows=(0, 1)),
        Chart("Learning rate", "", [Series("learning rate", series(log, "lr"))], shows=(0,)),
        Chart("Speed", "tokens/s", [Series("speed", series(log, "tok_s"), noisy=True)], shows=(0,)),
        Chart("Gradient norm", "before clipping",
              norms or [Series("norm", series(log, "grad_norm"), noisy=True)], log=True),
    ]  # fmt: skip
    tokens = log[-1]["tokens"]
    full = [chart for chart in charts if any(one.points for one in chart.series)]
    figures = [_figure(chart, f"chart{i}", tokens) for i, chart in enumerate(full)]
    return f'<section class="charts" aria-label="Curves">{"".join(figures)}</section>'


def _figure(chart: Chart, key: str, tokens: float) -> str:
    legend = ""
    if len(chart.series) > 1:
        legend = "".join(f'<i class="s{i}"></i>{escape(one.name)}' for i, one in enumerate(chart.series, 1))
    caption = f"{escape(chart.title)} <span>{escape(chart.unit)}{legend}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{svg(chart, key, tokens)}</figure>"


def _tiles(result: dict[str, Any], teacher: float | None) -> str:
    tiles = {}
    if "student" in result["kl"]:
        tiles["KL from teacher, nats per token"] = f"{result['kl']['student']:.4f}"
        tiles["same top token as the teacher"] = f"{100 * result['same_top']['student']:.1f} %"
    tiles |= {
        "training tokens": label(result["tokens"]),
        "training time": duration(result["seconds"]),
        "tokens/s": label(result["tokens"] / result["seconds"]),
    }
    if teacher:
        student = result["perplexity"]["student"]
        tiles |= {"held-out perplexity": f"{student:.2f}", "relative to the teacher": f"{student / teacher:.3f} ×"}
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span class="soft">{name}</span></div>' for name, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _perplexity_table(result: dict[str, Any], teacher: float | None) -> str:
    if not teacher:
        return ""
    kl = result["kl"]
    rows = [
        (
            FORMS[form],
            f"{value:.2f}",
            f"{value / teacher:.3f}",
            *([f"{kl[form]:.4f}" if form in kl else ""] if kl else []),
        )
        for form, value in result["perplexity"].items()
    ]
    head = ("model", "perplexity", "/ teacher's", *(["KL from teacher, nats per token"] if kl else []))
    return f"<h2>Perplexity on {label(result['held_out_tokens'])} held-out tokens</h2>" + _table(head, rows)


def _options(title: str, options: dict[str, Any]) -> str:
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in options.items()]
    return f"<section><h2>{title}</h2>{_table(('option', 'value'), rows, numbers=False)}</section>"


def _evaluations(log: Sequence[dict[str, Any]], teacher: float | None) -> str:
    rows = [
        (f"{int(tokens):,}", f"{value:.3f}", f"{value / teacher:.4f}" if teacher else "")
        for tokens, value in series(log, "perplexity")
    ]
    if not rows:
        return ""
    table = _table(("tokens", "perplexity", "/ teacher's"), rows)
    return f"<details><summary>All evaluations</summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Text cells, escaped here; all columns but the first are flush right if they hold `numbers`."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if numbers and i else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    return f'<div class="table"><table>{row("th", head)}{"".join(row("td", cells) for cells in rows)}</table></div>'
