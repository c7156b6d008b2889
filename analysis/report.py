"""The report of a study: one HTML file, complete in itself, each figure as SVG, PDF and PNG, and the arrays as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base.files import write_file
from dfssm.base.page import document, table

from . import plot
from .material import Study

FORMS = ("svg", "pdf", "png")

_STYLE = """
figure { margin: .6rem 0; padding: .7rem; }
svg { color: var(--soft); }
table { font-size: .85rem; }
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
    body = [
        f"<h1>{escape(str(result['model']))}</h1>",
        f'<p class="soft">{escape(result["kind"] + beside)}</p>\n<p>{escape(head)}</p>',
        *map(_section, studies, pictures),
    ]
    return document(f"{result['model']}: knowledge study", body, _STYLE)


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
    rows = [[name, *(" · ".join(map(repr, words)) for words in found.values())] for name, found in tokens.items()]
    made = table(["", *(f"layer {stage}" for stage in stages)], rows, numbers=False)
    return f"<details><summary>First tokens of each category</summary>\n{made}</details>\n"
