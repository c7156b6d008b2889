"""How figures look: colours that the colour-blind tell apart, and that are legible on white and on black."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from .material import AGAINST, MODEL, RANDOM, Study
from .phases import Boundary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#767676"
"""Of text and axes: the page puts its own colour in its place."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito's."""

MARKERS = "osD^vP*X"

STYLES: Mapping[str, dict[str, Any]] = {
    MODEL: {"color": COLOURS[0], "marker": "o", "linewidth": 2},
    AGAINST: {"color": COLOURS[1], "marker": "s", "linewidth": 1.5, "linestyle": "--"},
    RANDOM: {"color": COLOURS[4], "marker": "x", "linewidth": 1, "linestyle": ":"},
}
_SHUFFLED: dict[str, Any] = {"color": INK, "alpha": 0.35, "linewidth": 0}
_SIZE = 3  # of a marker

_STYLE: Any = {
    "font.size": 8, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "none", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "svg.fonttype": "none", "pdf.fonttype": 42, "figure.constrained_layout.use": True,
    "axes.titlesize": 8, "legend.fontsize": 7, "svg.hashsalt": "dfssm",
}  # fmt: skip


Make = Callable[..., Study]


def styled(make: Make) -> Make:
    """A study whose figure looks as all do: Matplotlib reads its settings when an artist is made."""

    @wraps(make)
    def study(*arguments: Any) -> Study:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return make(*arguments)

    return study


def figure(
    rows: int = 1, columns: int = 1, height: float = 2.8, width: float = 7.0, **options: Any
) -> tuple[Figure, Any]:
    """A figure of so many axes, `height` inches a row: itself and the axes [rows,columns]."""
    from matplotlib.figure import Figure

    made = Figure((width, height * rows))
    return made, made.subplots(rows, columns, squeeze=False, **options)


def curve(axes: Axes, layers: np.ndarray, values: Sequence[float] | np.ndarray, who: str, **options: Any) -> None:
    """One of STYLES' curves over the layers."""
    style: dict[str, Any] = {"markersize": _SIZE, "label": who} | dict(STYLES[who]) | options
    axes.plot(layers, values, **style)


def band(axes: Axes, layers: np.ndarray, draws: np.ndarray, label: str = "shuffled labels, 90 %") -> None:
    """Where 90 % of draws [n,L+1] lie; a draw that has no value at a layer does not count there."""
    axes.fill_between(layers, *np.nanquantile(draws, [0.05, 0.95], axis=0), label=label, **_SHUFFLED)


def interval(axes: Axes, layers: np.ndarray, draws: np.ndarray, who: str) -> None:
    """The same around a curve of `who`."""
    axes.fill_between(
        layers, *np.quantile(draws, [0.05, 0.95], axis=0), color=STYLES[who]["color"], alpha=0.2, linewidth=0
    )


def boundaries(axes: Axes, found: Sequence[Boundary]) -> None:
    """The phases that are claimed, with their intervals."""
    for one in found:
        if one.claimed:
            axes.axvspan(one.low - 0.5, one.high - 0.5, color=COLOURS[2], alpha=0.2, linewidth=0)
            axes.axvline(one.layer - 0.5, color=COLOURS[2], linewidth=1)


def over_layers(axes: Axes, layers: np.ndarray, label: str) -> None:
    """An axis of layers, with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer (0: embedding)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.margins(x=0.02)


def saved(made: Figure, form: str) -> bytes:
    """The file of a figure: "svg", "pdf" or "png", for a white page. The same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}, "png": {}}[form]
    with matplotlib.rc_context(_STYLE):
        made.savefig(out, format=form, dpi=160, metadata=metadata)
    return out.getvalue()


def inline(svg: bytes, name: str) -> str:
    """The file of a figure as an element of a page, in the colours of its text, with ids of its own."""
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(INK.lower(), "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)  # the white page
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    return re.sub(r"(?<=<svg)([^>]*)", lambda tag: re.sub(r' (?:width|height)="[^"]*"', "", tag[1]), text, count=1)
