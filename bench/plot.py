"""Speed as plots: of the figures of `dfssm.bench.report`, and of one run of `dfssm bench`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfssm.base.files import write_file

from .report_text import Figures, of_states

_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "dfssm", "font.size": 9}
_LIMIT = "0.85"  # a shade of grey


def plot_run(result: Mapping[str, Any], file: Path) -> None:
    """Write what one run of `dfssm bench` measured to `file`, an SVG or PNG by its suffix: this bundle beside its limit
    and its peers, and what else was asked for. DfssmError where it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    many = {str(one["batch"]): one for one in result["batches"]}
    columns = 2 + bool(many) + bool(result["speculation"]) + bool(result["ops"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure((3.4 * columns, 3.6), layout="constrained")
        axes = iter(figure.subplots(1, columns))
        figure.suptitle(f"{result['machine']['cpu']}, {result['threads']} threads, {result['state_dtype']} states")
        decode = next(axes)
        _bars(decode, "decode", {"dfssm": result})
        _peers(decode, {name: peer["tok_s"] for name, peer in result["peers"].items()})
        prompt = next(axes)
        _labelled(prompt, {"dfssm": result["prefill_tok_s"]})
        _peers(prompt, {name: peer["prefill_tok_s"] for name, peer in result["peers"].items()})
        prompt.set(title=f"prompt of {result['prompt']}", ylabel="tok/s")
        if many:
            _bars(next(axes), "sequences at once", {"1": result} | many)
        if result["speculation"]:
            shares = next(axes)
            _labelled(shares, {f"{one['right']:.0%}": one["tok_s"] for one in result["speculation"]})
            shares.axhline(result["tok_s"], color="0.5", linestyle="--", label="plain decode")
            shares.set(title="speculation", xlabel="drafts that are right", ylabel="tok/s")
        if result["ops"]:
            _ops(next(axes), result["ops"])
        handles = {
            name: one for axis in figure.axes for one, name in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
        _save(figure, file)


def _labelled(axis: Any, rates: Mapping[str, float], **look: Any) -> None:
    """Bars with their tok/s above."""
    axis.bar_label(axis.bar(list(rates), list(rates.values()), width=0.5, **look), fmt="%.0f")
    axis.margins(y=0.15)


def _peers(axis: Any, rates: Mapping[str, float]) -> None:
    if rates:
        _labelled(axis, rates, color="C1", label="peers")
        for name in axis.get_xticklabels():
            name.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
    axis.set_xlim(-0.75, len(rates) + 0.75)


def _ops(axis: Any, ops: Mapping[str, Any]) -> None:
    """Milliseconds of each op a token, the slowest on top, and how many the memory alone would take."""
    rows = sorted(ops["table"], key=lambda row: row["seconds"])
    names = [row["op"] for row in rows]
    axis.barh(names, [1e3 * row["seconds"] for row in rows], height=0.5)
    axis.barh(names, [1e3 * row["seconds"] * row["floor_share"] for row in rows], height=0.8, color=_LIMIT, zorder=0)
    axis.set(title="ops of a token", xlabel="ms")


def plots(figures: Figures, file: Path) -> None:
    """Write the plots of docs/performance.md to the SVG `file`: tok/s over what is varied, and beside each the limit
    there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    plain = figures.get("1.3b, 2 threads")
    threads = {n: figures[p] for n in ("1", "2") if (p := f"1.3b, {n} threads") in figures}
    batches = {"1": plain} | {str(b["batch"]): b for b in plain["batches"]} if plain else {}
    sizes = {n.removeprefix("size "): f for n, f in figures.items() if n.startswith("size ")}
    prompts = [f for n, f in figures.items() if n.startswith("prompt ")]
    if plain:
        sizes["1.3b"] = plain
        prompts.append(plain)
    moved = {n: sum(f["step_bytes"].values()) / 1e6 for n, f in sizes.items()}
    sizes = {n: sizes[n] for n in sorted(moved, key=moved.__getitem__)}
    prompts.sort(key=lambda f: f["prompt"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure((11, 6), layout="constrained")
        axes = figure.subplots(2, 3)
        _bars(axes[0, 0], "threads", threads)
        _bars(axes[0, 1], "sequences at once", batches)
        _bars(axes[0, 2], "form of the state", of_states(figures, 2))
        _bars(axes[1, 0], "size of the model", sizes)
        axes[0, 0].legend()

        line, along = axes[1, 1], [moved[n] for n in sizes]
        line.plot(along, [1e3 / f["tok_s"] for f in sizes.values()], "o-", label="dfssm")
        line.plot(along, [1e3 / f["floor_tok_s"] for f in sizes.values()], "--", color="0.5", label="limit")
        line.set(title="time is linear in bytes", xlabel="MB a token moves", ylabel="ms a token", xlim=0, ylim=0)
        line.legend()

        axes[1, 2].plot([f["prompt"] for f in prompts], [f["prefill_tok_s"] for f in prompts], "o-")
        axes[1, 2].set(title="length of the prompt", xlabel="tokens", ylabel="prefill, tok/s", ylim=0)
        for axis in axes.flat:
            if not axis.has_data():
                axis.remove()
        _save(figure, file)


def _bars(axis: Any, title: str, points: Mapping[str, Mapping[str, Any]]) -> None:
    """tok/s of each point, its share of the limit, and the limit behind."""
    rates, limits = ([p[key] for p in points.values()] for key in ("tok_s", "floor_tok_s"))
    names = [name.replace("-", "\n") for name in points]
    axis.bar(names, limits, color=_LIMIT, label="limit of the memory")
    drawn = axis.bar(names, rates, width=0.5, label="dfssm")
    axis.bar_label(drawn, [f"{p['tok_s']:.0f}\n{100 * p['floor_share']:.0f} %" for p in points.values()])
    axis.set(title=title, ylabel="tok/s, share of the limit")
    axis.margins(y=0.15)


def _save(figure: Any, file: Path) -> None:
    """The same figure gives the same bytes."""
    form, content = file.suffix[1:], io.BytesIO()
    figure.savefig(content, format=form, dpi=160, metadata={"Date": None} if form == "svg" else {"Software": None})
    write_file(file, content.getvalue())
