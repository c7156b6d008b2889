"""The figures of `dfssm.bench.report` as tables in Markdown, and as plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfssm.opset.markdown import table

Figures = dict[str, dict[str, Any]]
"""Name of a point of `report.POINTS` -> what `dfssm bench --json` printed."""

BASE = 65e6  # what Python, NumPy and ONNX Runtime may take beside the file and the state


def tables(figures: Figures) -> dict[str, str]:
    """Name -> a table, of what was measured."""
    made = {"goals": _goals, "peers": _peers, "ops": _ops, "points": _points, "machine": _machine}
    return {name: make(figures) for name, make in made.items()}


def _decode(found: dict) -> str:
    return f"{found['tok_s']:.1f} tok/s, {100 * found['floor_share']:.0f} %"


def _of(figures: Figures, point: str, text: Callable[[dict], str]) -> str:
    return text(figures[point]) if point in figures else "not measured"


def _goals(figures: Figures) -> str:
    def ratio(key: str, peer: str) -> Callable[[dict], str]:
        def text(found: dict) -> str:
            ratios = [each[key] for name, each in found["peers"].items() if peer in name]
            return f"{min(ratios):.2f} x" if ratios else "not measured"

        return text

    def batch(found: dict) -> str:
        (eight,) = found["batches"]
        return f"{eight['tok_s']:.0f} tok/s, {eight['tok_s'] / found['tok_s']:.2f} x batch 1"

    def memory(found: dict) -> str:
        beside = found["rss_bytes"] - found["step_bytes"]["weights"] - found["step_bytes"]["state_read"]
        return f"{found['rss_bytes'] / 1e6:.0f} MB = weights + state + {beside / 1e6:.0f}"

    def outside(found: dict) -> str:
        return f"{100 * found['ops']['outside_share']:.1f} %"

    lines: list[tuple[str, str, str, Callable[[dict], str]]] = [
        ("decode, 2 threads, share of the limit", "85 %", "2 threads", _decode),
        ("decode, 1 thread, share of the limit", "85 %", "1 threads", _decode),
        ("batch 8, 2 threads", "260 tok/s", "2 threads", batch),
        ("prompt of 512, 2 threads", "400 tok/s", "2 threads", lambda f: f"{f['prefill_tok_s']:.0f} tok/s"),
        ("resident memory", f"weights + state + {BASE / 1e6:.0f} MB", "2 threads", memory),
        ("load, warm, hashes checked", "0.15 s", "2 threads", lambda f: f"{f['load_seconds']:.2f} s"),
        ("outside our kernels", "3 %", "2 threads", outside),
    ]
    rows = [
        [what, goal, *(_of(figures, f"{bundle}, {point}", text) for bundle in ("1.3b", "avx2"))]
        for what, goal, point, text in lines
    ]
    for peer, name in (("llama.cpp", "llama.cpp's best"), ("stock-ort", "stock ONNX Runtime")):
        for key, what, goal in (("ratio", "decode", "2.5 x"), ("prefill_ratio", "prompt of 512", "3 x")):
            rows.append([f"{what}, beside {name}", goal, _of(figures, "peers", ratio(key, peer)), "not run"])
    if {"busy 1", "busy 2"} <= figures.keys():
        slower = 1 - figures["busy 2"]["tok_s"] / figures["busy 1"]["tok_s"]
        what = "2 threads beside 2 busy processes, slower than 1 thread there by"
        rows.append([what, "10 %", f"{100 * slower:.0f} %", "not run"])
    return table(["", "goal", "AVX-512 VNNI", "AVX2 kernels"], rows)


def _peers(figures: Figures) -> str:
    if "peers" not in figures:
        return "not measured"
    found = figures["peers"]

    def rate(each: dict, key: str) -> str:
        low, high = each[f"{key}_quartiles"]
        return f"{each[key]:.1f} ({low:.1f} to {high:.1f})"

    rows = [["dfssm, fp16 states", rate(found, "tok_s"), "", rate(found, "prefill_tok_s"), "", ""]]
    for name, peer in found["peers"].items():
        ratios = [f"{peer[key]:.2f}" for key in ("ratio", "prefill_ratio")]
        decode, prefill = rate(peer, "tok_s"), rate(peer, "prefill_tok_s")
        rows.append([name, decode, ratios[0], prefill, ratios[1], peer["options"]])
    prompt = f"prompt of {found['prompt']}"
    return table(["", "decode, tok/s", "dfssm / it", f"{prompt}, tok/s", "dfssm / it", "how"], rows)


def _ops(figures: Figures) -> str:
    rows = []
    for bundle, isa in (("1.3b", "AVX-512 VNNI"), ("avx2", "AVX2")):
        for threads in (2, 1):
            ops = figures.get(f"{bundle}, {threads} threads", {}).get("ops")
            for row in sorted(ops["table"], key=lambda row: -row["seconds"]) if ops else []:
                cycle = f"{row['weights_cycle']:.1f}" if row["weights_cycle"] else ""
                share = f"{100 * row['floor_share']:.0f} %"
                figures_of = [f"{1e3 * row['seconds']:.2f}", f"{row['gb_s']:.1f}", cycle, share]
                rows.append([isa, str(threads), f"{row['op']} ({row['nodes']})", *figures_of])
            if ops:
                left = 1e3 * ops["outside_share"] * ops["seconds"]
                rows.append([isa, str(threads), "outside our kernels", f"{left:.2f}", "", "", ""])
    head = ["kernels", "threads", "op (nodes)", "ms a token", "GB/s", "weights a cycle of a core", "share of the limit"]
    return table(head, rows)


def _points(figures: Figures) -> str:
    rows = []
    for name, found in figures.items():
        if name == "batches":
            for batch in found["batches"]:
                rows.append([f"1.3b, batch {batch['batch']}", _decode(batch), "", ""])
        elif not name.startswith("busy"):
            gb_s = f"{found['gb_s']:.1f}"
            rows.append([name, _decode(found), gb_s, f"{found['prefill_tok_s']:.0f} ({found['prompt']} tokens)"])
    return table(["point", "decode, share of the limit", "GB/s", "prefill, tok/s"], rows)


def _machine(figures: Figures) -> str:
    found = next(iter(figures.values()))
    machine, packages = found["machine"], found["machine"]["packages"]
    size = f"{machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"
    runs = f"ONNX Runtime {packages['onnxruntime']}, NumPy {packages['numpy']}"
    return f"{machine['cpu']}, {size}, {machine['system']}, kernels {' '.join(machine['isas'])}, {runs}."


def plots(figures: Figures, file: Path) -> None:
    """Write the plots to the SVG `file`: tok/s over what is varied, and beside each the limit there."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "dfssm", "font.size": 9}
    from matplotlib import pyplot

    named = {word: {n: f for n, f in figures.items() if n.startswith(word)} for word in ("size ", "state ", "prompt ")}
    threads = {n: figures[p] for n in ("1", "2") if (p := f"1.3b, {n} threads") in figures}
    batches = {str(b["batch"]): b for b in figures.get("batches", {}).get("batches", [])}
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")

    def bars(axis: Any, title: str, points: dict[str, dict]) -> None:
        rates, limits = ([p[key] for p in points.values()] for key in ("tok_s", "floor_tok_s"))
        axis.bar(list(points), limits, color="0.85", label="limit of the memory")
        drawn = axis.bar(list(points), rates, width=0.5, label="dfssm")
        axis.bar_label(drawn, [f"{p['tok_s']:.0f}\n{100 * p['floor_share']:.0f} %" for p in points.values()])
        axis.set(title=title, ylabel="tok/s, share of the limit")

    bars(axes[0, 0], "threads", threads)
    bars(axes[0, 1], "sequences at once", batches)
    bars(axes[0, 2], "form of the state", {n.removeprefix("state "): f for n, f in named["state "].items()})
    bars(axes[1, 0], "size of the model", {n.removeprefix("size "): f for n, f in named["size "].items()})
    axes[0, 0].legend()

    moved = [sum(f["step_bytes"].values()) / 1e6 for f in named["size "].values()]
    axes[1, 1].plot(moved, [1e3 / f["tok_s"] for f in named["size "].values()], "o-", label="dfssm")
    axes[1, 1].plot(moved, [1e3 / f["floor_tok_s"] for f in named["size "].values()], "--", color="0.5", label="limit")
    axes[1, 1].set(title="time is linear in bytes", xlabel="MB a token moves", ylabel="ms a token", xlim=0, ylim=0)
    axes[1, 1].legend()

    prompts = list(named["prompt "].values())
    axes[1, 2].plot([f["prompt"] for f in prompts], [f["prefill_tok_s"] for f in prompts], "o-")
    axes[1, 2].set(title="length of the prompt", xlabel="tokens", ylabel="prefill, tok/s", ylim=0)
    for axis in axes.flat:
        if not axis.has_data():
            axis.remove()
    figure.savefig(file, metadata={"Date": None})
