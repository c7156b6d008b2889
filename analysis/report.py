"""The report of a study: one HTML file, complete in itself, each figure as SVG, PDF and PNG, and the arrays as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.opset.files import write_file

from . import plot
from .material import Study

FORMS = ("svg", "pdf", "png")

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d2127; --soft: #626a75; --line: #e3e4e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1c2025; --ink: #e7e9ec; --soft: #9aa3ae; --line: #30363d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; }
p { margin: .3rem 0; }
.soft { color: var(--soft); }
figure { margin: .6rem 0; padding: .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
svg { display: block; width: 100%; height: auto; color: var(--soft); }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
"""


def write_report(folder: Path, result: Mapping[str, Any], studies: Sequence[Study]) -> list[str]:
    """Write report.html, arrays.json and the figures to `folder`; returns their names. DfssmError where it cannot."""
    names = []

    def write(name: str, content: str | bytes) -> None:
        write_file(folder / name, content)
        names.append(name)

    drawn = {}
    for study in studies:
        for form in FORMS:
            content = plot.saved(study.figure, form)
            write(f"{study.name}.{form}", content)
            drawn[study.name, form] = content
    write("arrays.json", json.dumps({study.name: plain(study.arrays) for study in studies}, allow_nan=False))
    pictures = [plot.inline(drawn[study.name, "svg"], study.name) for study in studies]
    write("report.html", page(result, studies, pictures).encode(errors="replace"))  # names of files need not be UTF-8
    return names


def plain(value: Any) -> Any:
    """Arrays as lists, for JSON; numbers that JSON lacks become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def page(result: Mapping[str, Any], studies: Sequence[Study], pictures: Sequence[str]) -> str:
    """The text of report.html; `pictures`: the figures as elements of it."""
    beside = f", beside {result['against']}" if result["against"] else ""
    answers = result["answers"]
    head = (
        f"{result['count']} prompts in {len(result['categories'])} categories ({result['prompts']}); "
        f"{answers['one_token']} answers are one token, and they begin with {answers['different']} different ones. "
        f"{result['layers']} layers; layer 0 is the embedding. States are those of the last token of each prompt. "
        f"Beside each curve stand its nulls: labels shuffled {result['draws']} times, and a model of the same shape "
        "with random weights. A phase is claimed where its step is larger than those of both."
    )
    sections = map(_section, studies, pictures)
    title = escape(f"{result['model']}: knowledge study")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(str(result['model']))}</h1>\n"
        f'<p class="soft">{escape(result["kind"] + beside)}</p>\n<p>{escape(head)}</p>\n'
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(study: Study, picture: str) -> str:
    table = _tokens(study.arrays["tokens"]) if "tokens" in study.arrays else ""
    return (
        f'<section id="{study.name}">\n<h2>{escape(study.title)}</h2>\n<p>{escape(study.says)}</p>\n'
        f'<p class="soft">Null: {escape(study.null_says)}</p>\n'
        f"<figure>{picture}</figure>\n{table}</section>"
    )


def _tokens(tokens: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """The contrastive lens in words."""
    stages = list(next(iter(tokens.values())))
    head = "".join(f"<th>layer {stage}</th>" for stage in stages)
    rows = []
    for name, found in tokens.items():
        cells = "".join(f"<td>{escape(' · '.join(map(repr, words)))}</td>" for words in found.values())
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    body = "\n".join(rows)
    return (
        "<details><summary>First tokens of each category</summary>\n"
        f'<div class="wide"><table>\n<tr><th></th>{head}</tr>\n{body}\n</table></div></details>\n'
    )
