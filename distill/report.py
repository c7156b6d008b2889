"""The report page of a run: one HTML file from log.jsonl and result.json, complete in itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfssm.base import chart
from dfssm.base.chart import Axis, Chart, Point, Series, figure, label
from dfssm.base.files import write_file
from dfssm.base.numbers import duration
from dfssm.base.page import document, table, tiles

FORMS = {
    "teacher": "teacher",
    "data_free": "data-free conversion",
    "student": "student, as shipped",
    "as_trained": "student, as trained",
    "float_low_rank": "student with a float low rank",
    "float_embedding": "student with a float embedding",
}

_STYLE = """
section.charts { margin-top: 2rem; }
.table { max-width: 44rem; }
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
        _samples(log),
        '<div class="charts">',
        *(_options(title, result[title.lower()]) for title in ("Recipe", "Schedule")),
        "</div>",
        _evaluations(log, teacher),
    ]
    return document(f"{name}: distillation", body, chart.STYLE + _STYLE)


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
    tokens = Axis.until(max(log[-1]["tokens"], 1.0))
    full = [one for one in charts if any(each.points for each in one.series)]
    figures = [figure(one, f"chart{i}", tokens) for i, one in enumerate(full)]
    return f'<section class="charts" aria-label="Curves">{"".join(figures)}</section>'


def _tiles(result: dict[str, Any], teacher: float | None) -> str:
    found = {}
    if "student" in result["kl"]:
        found["KL from teacher, nats per token"] = f"{result['kl']['student']:.4f}"
        found["same top token as the teacher"] = f"{100 * result['same_top']['student']:.1f} %"
    found |= {
        "training tokens": label(result["tokens"]),
        "training time": duration(result["seconds"]),
        "tokens/s": label(result["tokens"] / result["seconds"]),
    }
    if teacher:
        student = result["perplexity"]["student"]
        found |= {"held-out perplexity": f"{student:.2f}", "relative to the teacher": f"{student / teacher:.3f} ×"}
    return tiles(found)


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
    return f"<h2>Perplexity on {label(result['held_out_tokens'])} held-out tokens</h2>" + table(head, rows)


def _samples(log: Sequence[dict[str, Any]]) -> str:
    """Each prompt with what the student made of it, from first to last."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for line in log:
        for sample in line.get("samples", ()):
            texts.setdefault(sample["prompt"], []).append((f"{line['tokens']:,}", sample["text"]))
    head = ("tokens", "the student's most likely continuation")
    parts = [f"<h2>{escape(prompt)}…</h2>" + table(head, rows, numbers=False) for prompt, rows in texts.items()]
    return f"<section>{''.join(parts)}</section>" if parts else ""


def _options(title: str, options: dict[str, Any]) -> str:
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in options.items()]
    return f"<section><h2>{title}</h2>{table(('option', 'value'), rows, numbers=False)}</section>"


def _evaluations(log: Sequence[dict[str, Any]], teacher: float | None) -> str:
    rows = [
        (f"{int(tokens):,}", f"{value:.3f}", f"{value / teacher:.4f}" if teacher else "")
        for tokens, value in series(log, "perplexity")
    ]
    if not rows:
        return ""
    found = table(("tokens", "perplexity", "/ teacher's"), rows)
    return f"<details><summary>All evaluations</summary>{found}</details>"
