"""One layer of a bundle as a drawing: its nodes from top to bottom, states to their left, detours to their right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dfssm.verify.layer import Node

STYLE = """
.layer { max-width: 46rem; margin: 0 auto; }
.layer rect { fill: var(--page); stroke: var(--line); }
.layer .ours { stroke: var(--s1); } .layer .state { stroke: var(--s2); stroke-dasharray: 5 4; }
.layer text { font-size: 12px; fill: var(--soft); text-anchor: middle; }
.layer .name { fill: var(--ink); font-size: 13px; }
.layer path { fill: none; stroke: var(--soft); }
.layer marker path { fill: var(--soft); stroke: none; }
"""

LEFT, BOX, HIGH, STEP, LANE = 300, 260, 46, 30, 26
"""In the drawing's own units: from where the boxes begin, their width and height, the room between two, and the room of
a detour."""

_LINE = 15  # of text in the box of the states


def layer_figure(nodes: Sequence[Node]) -> str:
    """The layer as an element of a page; what the names say is escaped."""
    tops, height = [], HIGH + STEP
    for node in nodes:
        room = max(HIGH, _LINE * len(node.states) + 16)
        tops.append(height + (room - HIGH) / 2)
        height += room + STEP
    ends = [0.0, *tops, height]  # the tops of what comes from above, of the nodes, and of what goes on
    reads = [(source + 1, place + 1) for place, node in enumerate(nodes) for source in node.sources]
    reads.append((len(nodes), len(nodes) + 1))
    lanes = _lanes([(start, end) for start, end in reads if end > start + 1])
    width = LEFT + BOX + LANE * (max(lanes.values(), default=0) + 1)
    parts = [_box("", ends[0], "residual stream", "")]
    for node, top in zip(nodes, tops, strict=True):
        parts.append(_box("ours" if node.ours else "", top, node.short_name, _under(node)))
        parts += _states(node, top)
    parts.append(_box("", height, "residual stream", ""))
    for start, end in reads:
        if end == start + 1:
            parts.append(_arrow(f"M{LEFT + BOX / 2} {ends[start] + HIGH:.0f}V{ends[end]:.0f}"))
        elif end > start:
            lane = LEFT + BOX + LANE * (lanes[start, end] + 0.7)
            out, back = ends[start] + HIGH - 12, ends[end] + 12
            parts.append(_arrow(f"M{LEFT + BOX} {out:.0f}H{lane:.0f}V{back:.0f}H{LEFT + BOX}"))
    words = "; ".join(f"{node.name}, {node.op}" for node in nodes)
    return (
        f'<svg class="layer" viewBox="0 0 {width:.0f} {height + HIGH + 1:.0f}" role="img" aria-label="{escape(words)}">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>' + "".join(parts) + "</svg>"
    )


def _lanes(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """A lane for each detour, the shortest innermost, so that no two in one lane run beside the same node."""
    taken: list[list[tuple[int, int]]] = []
    found = {}
    for start, end in sorted(set(spans), key=lambda span: (span[1] - span[0], span)):
        lane = 0
        while lane < len(taken) and any(start < other[1] and other[0] < end for other in taken[lane]):
            lane += 1
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        found[start, end] = lane
    return found


def _under(node: Node) -> str:
    return f"{node.op} → {node.output}" if str(node.output) else node.op


def _box(kind: str, top: float, name: str, under: str) -> str:
    middle = LEFT + BOX / 2
    name_at = top + (20 if under else 28)
    return (
        f'<rect class="{kind}" x="{LEFT}" y="{top:.0f}" width="{BOX}" height="{HIGH}" rx="6"/>'
        f'<text class="name" x="{middle}" y="{name_at:.0f}">{escape(name)}</text>'
        + (f'<text x="{middle}" y="{top + 37:.0f}">{escape(under)}</text>' if under else "")
    )


def _states(node: Node, top: float) -> list[str]:
    """What the node keeps from token to token, and the way there and back."""
    if not node.states:
        return []
    lines, middle = len(node.states), top + HIGH / 2
    high = _LINE * lines + 16
    first = middle - high / 2 + 20
    found = [f'<rect class="state" x="1" y="{middle - high / 2:.0f}" width="{LEFT - 51}" height="{high}" rx="6"/>']
    found += [
        f'<text x="{(LEFT - 50) / 2}" y="{first + _LINE * i:.0f}">{escape(f"{state.name}: {state}")}</text>'
        for i, state in enumerate(node.states)
    ]
    found.append(_arrow(f"M{LEFT - 50} {middle - 6:.0f}H{LEFT}"))
    if node.new_states:
        found.append(_arrow(f"M{LEFT} {middle + 6:.0f}H{LEFT - 50}"))
    return found


def _arrow(path: str) -> str:
    return f'<path d="{path}" marker-end="url(#arrow)"/>'
