"""How fast the CPU kernels are, beside what the memory gives: `python -m dfssm.bench.kernels`.

Every kernel runs on the shapes of the 1.3B model, all 48 layers in one call (one tall matrix, one large batch
of states), so that nothing it streams stays in a cache. Its output is checked before it is timed. Rounds are
interleaved: each round times every kernel once, with plain reads of memory before and after it. A share is a
kernel's GB/s over the mean of those two reads by the best pattern, because on a shared machine that ratio holds still
while both numbers move. A kernel that writes as much as it reads can pass 100 %. Medians over rounds; the spread is the
middle half.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click
import numpy as np

import dfssm._native as _native
from dfssm.opset import OPS
from dfssm.opset.layouts import LAYOUTS
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.packing import from_layout, up_from_layout
from dfssm.opset.reference import binary_scaffold_matmul_ref, int8_matmul_ref
from dfssm.targets import ort_cpu

from .bandwidth import Bandwidth, Probes

F32 = np.float32
LAYERS, D_MODEL, D_INNER, HEADS, HEADDIM, D_STATE, VOCABULARY, RANK = 48, 2048, 4096, 64, 64, 128, 50288, 16
CHANNELS = D_INNER + 2 * D_STATE
D_IN_PROJ = 2 * D_INNER + 2 * D_STATE + HEADS
READ_BYTES = 1 << 28


@dataclass
class Kernel:
    """One line of the table: `run()` moves `bytes`, in and out, and does `operations`, 2 a multiply-add."""

    name: str
    bytes: int
    operations: int
    run: Callable[[], object]
    check: Callable[[], None]


def _random_bytes(rng, *shape) -> np.ndarray:
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


def scaffold(rng, isa, threads, name, rows, columns, tokens, layers) -> Kernel:
    """`layers` projections of [rows, columns] under each other, as they are laid out for `isa`."""
    rows *= layers
    layout = ort_cpu.layout(isa=isa)
    block = LAYOUTS[layout].rows
    weights = dict(
        bits=_random_bytes(rng, rows, columns // 8),
        scale=rng.uniform(0.01, 0.1, rows).astype(F32),
        down=_random_bytes(rng, RANK, columns).view(np.int8),
        down_scale=rng.uniform(1e-4, 1e-3, RANK).astype(F32),
        up=_random_bytes(rng, rows, RANK).view(np.int8),
        up_scale=rng.uniform(1e-3, 1e-2, rows).astype(F32),
    )
    x = rng.standard_normal((1, tokens, columns)).astype(F32)
    out = np.empty((1, tokens, rows), F32)

    def run():
        _native.BinaryScaffoldMatMul(isa, x, **weights, layout=layout, threads=threads, out=out)

    def check():
        run()
        for at in rng.integers(rows // block, size=8):
            part = slice(block * at, block * at + block)
            sample = weights | {k: weights[k][part] for k in ("scale", "up_scale")}
            sample["bits"] = from_layout(weights["bits"][part], block, LAYOUTS[layout])
            sample["up"] = up_from_layout(weights["up"][part], block, LAYOUTS[layout])
            expected = binary_scaffold_matmul_ref(x, **sample)
            ALL_OPS["BinaryScaffoldMatMul"].tolerance(dict(R=RANK), "y").check(out[..., part], expected, name)

    moved = rows * (columns // 8 + RANK + 8) + RANK * columns + tokens * (columns + rows) * 4
    return Kernel(name, moved, 2 * tokens * rows * (columns + RANK), run, check)


def head(rng, isa, threads, name, tokens) -> Kernel:
    w = _random_bytes(rng, VOCABULARY, D_MODEL).view(np.int8)
    w_scale = rng.uniform(1e-4, 1e-2, VOCABULARY).astype(F32)
    x = rng.standard_normal((1, tokens, D_MODEL)).astype(F32)
    out = np.empty((1, tokens, VOCABULARY), F32)

    def run():
        _native.Int8MatMul(isa, x, w, w_scale, threads=threads, out=out)

    def check():
        run()
        rows = rng.integers(VOCABULARY, size=256)
        expected = int8_matmul_ref(x, w[rows], w_scale[rows])
        ALL_OPS["Int8MatMul"].tolerance({}, "y").check(out[..., rows], expected, name)

    moved = w.nbytes + w_scale.nbytes + x.nbytes + out.nbytes
    return Kernel(name, moved, 2 * tokens * w.size, run, check)


def whole(rng, isa, threads, name, op, operations, **sizes) -> Kernel:
    """An op on inputs drawn as for its tests, states updated in place."""
    spec, function = OPS[op], getattr(_native, op)
    inputs = spec.draw(rng, {}, "normal", **sizes)
    out = np.empty_like(inputs[spec.inputs[0].name])

    def run():
        function(isa, **inputs, threads=threads, in_place=True, out=out)

    def check():
        found = (function(isa, **inputs, threads=threads), spec.reference(**inputs))
        actual, expected = (outputs if isinstance(outputs, tuple) else (outputs,) for outputs in found)
        for output, a, e in zip(spec.outputs, actual, expected, strict=False):
            ALL_OPS[op].tolerance(sizes, output.name).check(a, e, f"{name} {output.name}")

    written = [out, *(inputs[output.over] for output in spec.outputs[1:] if output.over in inputs)]
    moved = sum(array.nbytes for array in (*inputs.values(), *written))
    return Kernel(name, moved, operations, run, check)


def scan(dtype: str, tokens: int, layers: int) -> Callable[..., Kernel]:
    """The states of `layers` layers as a batch."""
    sizes = {"B": layers, "T": tokens, "H": HEADS, "P": HEADDIM, "N": D_STATE}
    return partial(whole, op="SelectiveScanStep", operations=6 * math.prod(sizes.values()), state=dtype, **sizes)


def conv(tokens: int) -> Callable[..., Kernel]:
    sizes = {"B": LAYERS, "T": tokens, "C": CHANNELS}
    return partial(whole, op="CausalConv1dStep", operations=8 * math.prod(sizes.values()), W=4, **sizes)


def norm(op: str, channels: int) -> Callable[..., Kernel]:
    return partial(whole, op=op, operations=4 * LAYERS * channels, B=LAYERS, T=1, C=channels)


def quantize(rng, isa, threads, name) -> Kernel:
    x = rng.standard_normal((LAYERS, D_INNER)).astype(F32)

    def check():
        q, s, _ = _native.quantize_activations(isa, x)
        np.testing.assert_allclose(q * s[:, None], x, atol=float(s.max()) * 0.51)

    return Kernel(name, 5 * x.size, x.size, lambda: _native.quantize_activations(isa, x), check)


DECODE: dict[str, Callable[..., Kernel]] = {
    "in_proj": partial(scaffold, rows=D_IN_PROJ, columns=D_MODEL, tokens=1, layers=LAYERS),
    "out_proj": partial(scaffold, rows=D_MODEL, columns=D_INNER, tokens=1, layers=LAYERS),
    "lm_head": partial(head, tokens=1),
    "scan fp32": scan(dtype="float32", tokens=1, layers=LAYERS),
    "scan fp16": scan(dtype="float16", tokens=1, layers=LAYERS),
    "scan int8": scan(dtype="int8", tokens=1, layers=LAYERS),
    "conv": conv(tokens=1),
    "gated_rms_norm": norm("GatedRMSNorm", D_INNER),
    "rms_norm": norm("RMSNorm", D_MODEL),
    "quantize": quantize,
}
PREFILL: dict[str, Callable[..., Kernel]] = {
    "in_proj, 2 tokens": partial(scaffold, rows=D_IN_PROJ, columns=D_MODEL, tokens=2, layers=LAYERS),
    "in_proj, 8 tokens": partial(scaffold, rows=D_IN_PROJ, columns=D_MODEL, tokens=8, layers=8),
    "in_proj, 516 tokens": partial(scaffold, rows=D_IN_PROJ, columns=D_MODEL, tokens=516, layers=1),
    "out_proj, 516 tokens": partial(scaffold, rows=D_MODEL, columns=D_INNER, tokens=516, layers=1),
    "lm_head, 8 tokens": partial(head, tokens=8),
    "lm_head, 64 tokens": partial(head, tokens=64),
    "scan fp32, 512 tokens": scan(dtype="float32", tokens=512, layers=1),
    "scan int8, 512 tokens": scan(dtype="int8", tokens=512, layers=1),
    "conv, 64 tokens": conv(tokens=64),
}


def _quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def measure(isa: str, threads: int, rounds: int, names: list[str], seed: int = 0) -> dict:
    """Check, then time the kernels of these names (keys of DECODE and PREFILL) in interleaved rounds."""
    makers = {name: make for name, make in (DECODE | PREFILL).items() if name in names}
    kernels = [make(np.random.default_rng(seed), isa, threads, name) for name, make in makers.items()]
    for kernel in kernels:
        kernel.check()
        kernel.run()
    bandwidth = Bandwidth(READ_BYTES, threads)
    reads = [Probes(bandwidth.patterns) for _ in kernels]
    seconds = np.empty((len(kernels), rounds))
    for one in range(rounds):
        for i, kernel in enumerate(kernels):
            before = bandwidth.read()
            start = time.perf_counter()
            kernel.run()
            seconds[i, one] = time.perf_counter() - start
            reads[i].add(before, bandwidth.read())
    return {
        "isa": isa,
        "threads": threads,
        "rounds": rounds,
        "read_gb_s": _quartiles(np.array([probes.rates for probes in reads])),
        "kernels": [
            {
                "name": k.name,
                "bytes": k.bytes,
                "operations": k.operations,
                "ms": _quartiles(1e3 * took),
                "gb_s": _quartiles(1e-9 * k.bytes / took),
                "gop_s": _quartiles(1e-9 * k.operations / took),
                "share_of_read": _quartiles(1e-9 * k.bytes / took / around.rates),
            }
            for k, took, around in zip(kernels, seconds, reads, strict=True)
        ],
    }


def _print(result: dict) -> None:
    read = result["read_gb_s"]
    print(f"{result['isa']}, {result['threads']} threads, {result['rounds']} rounds; median (middle half)")
    print(f"plain read of memory: {read['median']:.1f} GB/s ({read['low']:.1f} .. {read['high']:.1f})")
    print(f"{'kernel':24}{'ms':>9}{'GB/s':>8}{'share of read':>24}{'Gop/s':>9}")
    for k in result["kernels"]:
        share = "{median:7.0%} ({low:.0%} .. {high:.0%})".format(**k["share_of_read"])
        print(f"{k['name']:24}{k['ms']['median']:9.3f}{k['gb_s']['median']:8.1f}{share:>24}{k['gop_s']['median']:9.1f}")


@click.command(help=__doc__)
@click.option("--isa", type=click.Choice(_native.isas()), default=_native.isas()[-1])
@click.option("--threads", type=click.IntRange(1, 1024), default=1)
@click.option("--rounds", type=click.IntRange(1, 10_000), default=9)
@click.option("--only", multiple=True, type=click.Choice([*DECODE, *PREFILL]), help="Repeatable; default: decode.")
@click.option("--prefill", is_flag=True, help="The kernels of prefill in place of those of decode.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(isa: str, threads: int, rounds: int, only: tuple[str, ...], prefill: bool, as_json: bool) -> None:
    result = measure(isa, threads, rounds, list(only or (PREFILL if prefill else DECODE)))
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


if __name__ == "__main__":
    main()
