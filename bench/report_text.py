"""The figures of `dfssm.bench.report` as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dfssm.base.markdown import table

Figures = dict[str, dict[str, Any]]
"""Name of one of `report.points` -> what `dfssm bench --json` printed."""

STATES = ("fp32", "fp16", "int8", "fp16-deferred", "int8-deferred")
"""Forms of the state that are measured."""

BASE = 65e6  # what Python, NumPy and ONNX Runtime may take beside the file and the state

TITLES = {"avx2": "AVX2", "avxvnni": "AVX-VNNI", "avx512vnni": "AVX-512 VNNI", "avx512vbmi": "AVX-512 VBMI"}


@dataclass(frozen=True)
class Goals:
    """Of one instruction set: shares of the limit with two threads and one, in %; tok/s; times a peer's."""

    decode: tuple[int, int]
    batch: int
    prompt: int
    peers: dict[str, tuple[str, str]]


_PROMPT = "3 x"
_AVX512 = Goals((85, 85), 260, 400, {"llama.cpp": ("2.5 x", _PROMPT), "stock-ort": ("2.5 x", _PROMPT)})
GOALS = {
    "avx2": Goals((80, 72), 165, 200, {"llama.cpp": ("2.8 x", _PROMPT), "stock-ort": ("2.7 x", _PROMPT)}),
    "avx512vnni": _AVX512,
    "avx512vbmi": _AVX512,
}


def isa_of(figures: Figures) -> str:
    """The best instruction set of the machine that made them."""
    best: str = next(iter(figures.values()))["machine"]["isas"][-1]
    return best


def tables(figures: Figures) -> dict[str, str]:
    """Name -> a table, of what was measured."""
    made = {"goals": _goals, "peers": _peers, "ops": _ops, "points": _points, "machine": _machine}
    return {name: make(figures) for name, make in made.items()}


def of_states(figures: Figures, threads: int) -> Figures:
    """Form of the state -> the figures of 1.3b with it."""
    points = {state: f"state {state}, {threads} threads" for state in STATES} | {"fp16": f"1.3b, {threads} threads"}
    return {state: figures[point] for state, point in points.items() if point in figures}


def _kernels(figures: Figures) -> dict[str, str]:
    """Bundle of the points with all measurements -> the kernels that ran it."""
    best = TITLES.get(isa_of(figures), isa_of(figures))
    return {"1.3b": best} | ({"avx2": "AVX2"} if any(name.startswith("avx2") for name in figures) else {})


def _decode(found: dict) -> str:
    return f"{found['tok_s']:.1f} tok/s, {100 * found['floor_share']:.0f} %"


def _of(figures: Figures, point: str, text: Callable[[dict], str]) -> str:
    return text(figures[point]) if point in figures else "not measured"


def _goals(figures: Figures) -> str:
    goals = GOALS.get(isa_of(figures))
    rows = [
        ["decode, 2 threads, share of the limit", f"{goals.decode[0]} %" if goals else ""],
        ["decode, 1 thread, share of the limit", f"{goals.decode[1]} %" if goals else ""],
        ["batch 8, 2 threads", f"{goals.batch} tok/s" if goals else ""],
        ["prompt of 512, 2 threads", f"{goals.prompt} tok/s" if goals else ""],
        ["resident memory", f"weights + state + {BASE / 1e6:.0f} MB"],
        ["load, warm, hashes checked", "0.15 s"],
        ["outside our kernels", "3 %"],
    ]
    kernels = _kernels(figures)
    for bundle in kernels:
        for row, reached in zip(rows, _reached(figures, bundle), strict=True):
            row.append(reached)
    others = ["not run"] * (len(kernels) - 1)
    for peer, name in (("llama.cpp", "llama.cpp's best"), ("stock-ort", "stock ONNX Runtime")):
        wanted = goals.peers[peer] if goals else ("", "")
        for key, what, goal in zip(("ratio", "prefill_ratio"), ("decode", "prompt of 512"), wanted, strict=True):
            rows.append([f"{what}, beside {name}", goal, _beside(figures, key, peer), *others])
    if {"busy 1", "busy 2"} <= figures.keys():
        slower = 1 - figures["busy 2"]["tok_s"] / figures["busy 1"]["tok_s"]
        what = "2 threads beside 2 busy processes, slower than 1 thread there by"
        rows.append([what, "10 %", f"{100 * slower:.0f} %", *others])
    return table(["", "goal", *kernels.values()], rows)


def _reached(figures: Figures, bundle: str) -> list[str]:
    """Decode with two threads and one and batch 8, each in the form of the state that is fastest; then of fp16 states
    the prompt, memory, load, and the time outside our kernels.
    """

    def fastest(threads: int, rate: Callable[[dict], float], text: Callable[[dict], str]) -> str:
        plain = f"{bundle}, {threads} threads"
        found = list(of_states(figures, threads).values()) if bundle == "1.3b" else [figures.get(plain)]
        best = max(filter(None, found), key=rate, default=None)
        return f"{text(best)}, {best['state_dtype']} states" if best else "not measured"

    def eight(found: dict) -> float:
        return next(float(batch["tok_s"]) for batch in found["batches"] if batch["batch"] == 8)

    def memory(found: dict) -> str:
        beside = found["rss_bytes"] - found["step_bytes"]["weights"] - found["step_bytes"]["state_read"]
        return f"{found['rss_bytes'] / 1e6:.0f} MB = weights + state + {beside / 1e6:.0f}"

    full: tuple[Callable[[dict], str], ...] = (
        lambda f: f"{f['prefill_tok_s']:.0f} tok/s",
        memory,
        lambda f: f"{f['load_seconds']:.2f} s",
        lambda f: f"{100 * f['ops']['outside_share']:.1f} %",
    )
    return [
        *(fastest(threads, lambda f: float(f["tok_s"]), _decode) for threads in (2, 1)),
        fastest(2, eight, lambda f: f"{eight(f):.0f} tok/s"),
        *(_of(figures, f"{bundle}, 2 threads", text) for text in full),
    ]


def _beside(figures: Figures, key: str, peer: str) -> str:
    """The least ratio of `key` over the variants of a peer."""
    peers = figures["peers"]["peers"] if "peers" in figures else {}
    ratios = [each[key] for name, each in peers.items() if peer in name]
    return f"{min(ratios):.2f} x" if ratios else "not measured"


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
    for bundle, isa in _kernels(figures).items():
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
        if name.startswith("busy"):
            continue
        gb_s = f"{found['gb_s']:.1f}"
        rows.append([name, _decode(found), gb_s, f"{found['prefill_tok_s']:.0f} ({found['prompt']} tokens)"])
        rows += [[f"{name}, batch {batch['batch']}", _decode(batch), "", ""] for batch in found["batches"]]
    return table(["point", "decode, share of the limit", "GB/s", "prefill, tok/s"], rows)


def _machine(figures: Figures) -> str:
    found = next(iter(figures.values()))
    machine, packages = found["machine"], found["machine"]["packages"]
    size = f"{machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"
    runs = f"ONNX Runtime {packages['onnxruntime']}, NumPy {packages['numpy']}"
    return f"{machine['cpu']}, {size}, {machine['system']}, kernels {' '.join(machine['isas'])}, {runs}."
