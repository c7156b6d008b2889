"""The page of `dfssm inspect --html`: one file, complete in itself. Whatever a bundle says in it is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfssm.base import chart
from dfssm.base.chart import Axis, Chart, Series, figure, label
from dfssm.base.page import document, table, tiles
from dfssm.bench.roofline import roofline
from dfssm.opset.layouts import LAYOUTS
from dfssm.verify.layer import Node

from .layer_figure import STYLE as OF_LAYER
from .layer_figure import layer_figure
from .options import megabytes

_ROWS = 100  # of a table, at most: a manifest may list any number of names

_STYLE = """
.table + p { margin-top: .7rem; }
.roofline { max-width: 36rem; margin: .8rem 0; }
.sizes td:first-child, .nodes td:not(:nth-child(3)) { white-space: nowrap; }
.sizes td:nth-child(2) { width: 50%; }
.bar { height: .8rem; border-radius: 3px; background: var(--s1); min-width: 1px; }
"""


def page(result: Mapping[str, Any], words: Sequence[str], layer: Sequence[Node]) -> str:
    """The page of what `dfssm inspect --json` prints; `words`: what it is, in lines; `layer`: the nodes of layer 0,
    none where there is no graph.
    """
    name = Path(result["path"]).name or str(result["path"])
    parts = [
        f"<h1>{escape(name)}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in words),
        tiles(_figures(result)),
        "<h2>Size by component</h2>",
        _sizes(result["sizes"]),
    ]
    if result["target"]:
        parts += [
            "<h2>Error per layer</h2>",
            *_errors(result["comparison"]),
            "<h2>Speed</h2>",
            *_speed(result),
            "<h2>Graph of layer 0</h2>",
            *_graph(layer),
            "<h2>Numerics</h2>",
            *_numerics(result),
        ]
    rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in result["config"].items()]
    files = [(name, f"{size:,}") for name, size in result["files"].items()]
    parts += [
        f"<details><summary>Config</summary>{_table(('key', 'value'), rows, numbers=False)}</details>",
        f"<details><summary>Files</summary>{_table(('file', 'bytes'), files)}</details>",
    ]
    if result["tools"]:
        tools = [(str(tool), str(version)) for tool, version in result["tools"].items()]
        parts.append(f"<details><summary>Made with</summary>{_table(('tool', 'version'), tools, False)}</details>")
    return document(f"{name}: inspection", parts, chart.STYLE + OF_LAYER + _STYLE)


def _figures(result: Mapping[str, Any]) -> dict[str, str]:
    """What leads the page."""
    found = {"all weights": megabytes(sum(result["sizes"].values()))}
    if moved := result["step_bytes"]:
        found["moved for a token, at least"] = megabytes(sum(moved.values()))
        found["operations a token"] = label(result["step_operations"])
    if speed := result["speed"]:
        found["tokens/s"] = f"{speed['tok_s']:.1f}"
        found["of the limit of the memory"] = f"{100 * speed['floor_share']:.0f} %"
    if comparison := result["comparison"]:
        found["largest error of the logits"] = f"{comparison['max_rel']:.1e}"
        found["against the student"] = "passed" if comparison["passed"] else "FAILED"
    return found


def _sizes(sizes: Mapping[str, int]) -> str:
    whole = sum(sizes.values())
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td><div class="bar" style="width: {100 * size / whole:.1f}%"></div></td>'
        f'<td class="number">{megabytes(size)}</td><td class="number">{100 * size / whole:.1f} %</td></tr>'
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
        if size
    )
    return f'<div class="table sizes"><table>{rows}</table></div>'


def _errors(comparison: Mapping[str, Any] | None) -> Iterable[str]:
    """A chart for each op and each state: its error in every layer, beside what is allowed."""
    if not comparison:
        yield "<p>Not measured: <code>--against MODEL</code> compares the bundle with its student.</p>"
        return
    key = "rms_rel" if comparison["identical"] is None else "max_rel"  # of an engine: see verify/engine.py
    of_kind: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, found in {**comparison["layers"], **comparison["outputs"]}.items():
        head, _, tail = name.rpartition(".")
        if name.startswith("layers."):
            of_kind.setdefault(tail, {})[int(head.removeprefix("layers."))] = found
        elif head:
            of_kind.setdefault(head, {})[int(tail)] = found
    worst = "largest error, as a share of the largest value"
    what = worst if key == "max_rel" else "rms of the error, as a share of the rms of the value"
    yield (
        f"<p>{comparison['tokens']} random tokens; {what}. Each layer of the student reads what the bundle's layer "
        "read, so an error shows where it arises. A layer without a dot has no error.</p>"
    )
    figures = []
    for i, (kind, found) in enumerate(of_kind.items()):
        points = [(float(layer), entry[key]) for layer, entry in found.items() if entry[key]]  # 0 has no logarithm
        allowed = max(entry["tolerance"] for entry in found.values())
        one = Chart(kind, "", [Series("error", points, dots=True)], ("allowed", allowed), log=True, across="layer",
                    at="layer {}")  # fmt: skip
        figures.append(figure(one, f"error{i}", Axis.numbers(len(found))))
    yield f'<section class="charts" aria-label="Errors">{"".join(figures)}</section>'


def _speed(result: Mapping[str, Any]) -> Iterable[str]:
    moved = result["step_bytes"]
    rows = [
        ("weights read", megabytes(moved["weights"])),
        ("state read", megabytes(moved["state_read"])),
        ("state written", megabytes(moved["state_written"])),
        ("operations", label(result["step_operations"])),
    ]
    yield table(("one token of one sequence", "at least"), rows)
    speed = result["speed"]
    if not speed:
        yield "<p>Not measured: <code>--measure</code> runs the bundle on this machine.</p>"
        return
    bandwidth, points = roofline(speed, result["step_operations"])
    x = Axis.powers([point.intensity for point in points])
    roof = [(at, bandwidth * at) for at in (x.low, x.high)]
    drawn = Chart(
        "Roofline",
        f"operations/s; memory {bandwidth / 1e9:.1f} GB/s",
        [
            Series("limit of the memory", roof),
            Series("measured", [(p.intensity, p.rate) for p in points], dots=True, names=[p.name for p in points]),
        ],
        across="operations for each byte that is moved",
        at="{} operations a byte",
    )
    y = Axis.powers([*(rate for _, rate in roof), *(point.rate for point in points)])
    of = speed["machine"]
    yield f'<div class="roofline">{figure(drawn, "roofline", x, y)}</div>'
    yield (
        f"<p>{escape(of['cpu'])}, {speed['threads']} threads; medians over {speed['rounds']} rounds. What lies far "
        "below the line is limited by arithmetic, not by the memory.</p>"
    )
    runs = [("decode", speed), *((f"batch {batch['batch']}", batch) for batch in speed["batches"])]
    cells = [(n, f"{r['tok_s']:.1f}", f"{r['floor_tok_s']:.1f}", f"{100 * r['floor_share']:.0f} %") for n, r in runs]
    cells.append((f"prompt of {speed['prompt']}", f"{speed['prefill_tok_s']:.1f}", "", ""))
    yield table(("", "tokens/s", "limit", "share"), cells)


def _graph(layer: Sequence[Node]) -> Iterable[str]:
    if not layer:
        yield "<p>An engine shows none: compile the model with <code>--target ort-cpu</code> to see it.</p>"
        return
    yield f"<figure>{layer_figure(layer)}</figure>"
    rows = []
    for node in layer:
        weights = "; ".join(f"{weight.name.removeprefix('layers.0.')}: {weight}" for weight in node.weights)
        rows.append((node.short_name, node.op, weights, str(node.output)))
    made = table(("node", "op", "weights", "output"), rows, numbers=False)
    yield f'<details class="nodes"><summary>Nodes and their weights</summary>{made}</details>'


def _numerics(result: Mapping[str, Any]) -> Iterable[str]:
    layout = LAYOUTS[result["layout"]].name
    yield (
        "<p>Weights: 1 bit with a scale a row; low rank, head and embedding int8 with a scale a row; all else fp32. "
        f"Layout of the bits: {layout}. Activations: int8 with a scale a token. Sums of integers: exact. States: "
        f"{result['state_dtype']} between calls. All other arithmetic: fp32.</p>"
    )
    recorded = result["verification"]
    of_graph = recorded.get("graph")
    found = of_graph if isinstance(of_graph, dict) else recorded
    outputs = found.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        yield "<p>dfcompile did not verify this bundle (<code>--no-verify</code>).</p>"
        return
    rows = [
        (str(name), *(_number(entry, key) for key in ("max_abs", "max_rel", "tolerance")))
        for name, entry in outputs.items()
    ]
    yield (
        "<p>What dfcompile recorded when it verified the bundle op by op, on the machine that made it: the worst over "
        "layers and tokens.</p>"
    )
    yield _table(("output", "largest error", "as a share of the largest value", "allowed"), rows)
    states = found.get("states")
    if isinstance(states, dict):
        share = _number(states, "share")
        yield f"<p>The largest number in a state over a long run, as a share of what fp16 holds: {escape(share)}.</p>"


def _number(entry: Any, key: str) -> str:
    """A figure of a manifest, which may say anything."""
    found = entry.get(key) if isinstance(entry, dict) else None
    return f"{found:.1e}" if isinstance(found, float) else str(found)[:20]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """`table` of the first rows, and how many are left out."""
    more = len(rows) - _ROWS
    return table(head, rows[:_ROWS], numbers) + (f"<p>and {more:,} more</p>" if more > 0 else "")
