"""What a decode step should take on GPUs that were not at hand: predicted from bytes and instructions, not measured.

    python -m dfssm.bench.gpu            the tables of docs/gpu.md and docs/jetson.md

A kernel's time is a fixed part and the longest of what it asks of the memory, the tensor cores and the issue slots.
Bytes follow from the shapes; instructions were counted in the machine code (docs/gpu.md says how); nothing was fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BATCHES = (1, 8, 32, 128, 512)

# Share of the nominal bandwidth that streaming kernels reach, and of the issue slots that a kernel of many warps fills.
BANDWIDTH_SHARE, ISSUE_SHARE = 0.85, 0.7

# Seconds that a node of a CUDA graph takes whatever its size: the launch, and dependent trips to memory.
NODE = 2e-6


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: bytes/s, SMs, Hz, int8 multiply-adds a clock and SM (mma.sync, dense); of a module, the power
    budget in watts.
    """

    name: str
    bandwidth: float
    sms: int
    clock: float
    int8_macs: float
    watts: float = math.nan


GPUS = (
    Gpu("A100 40GB", 1555e9, 108, 1.41e9, 2048),
    Gpu("L4", 300e9, 58, 2.04e9, 1024),
    Gpu("H100 SXM", 3350e9, 132, 1.755e9, 0.6 * 4096),  # mma.sync reaches some 60 % of what wgmma does
    Gpu("RTX 4090", 1008e9, 128, 2.52e9, 1024),
    Gpu("RTX 5090", 1792e9, 170, 2.41e9, 1024),
    Gpu("Orin AGX", 205e9, 16, 1.3e9, 2048),
)

# Their largest budgets; of Orin NX and Nano those of the mode "Super".
JETSONS = (
    Gpu("Thor T5000", 273e9, 20, 1.57e9, 2048, 130),
    Gpu("AGX Orin 64GB", 205e9, 16, 1.3e9, 2048, 60),
    Gpu("Orin NX 16GB", 102e9, 8, 1.17e9, 2048, 40),
    Gpu("Orin Nano 8GB", 102e9, 8, 1.02e9, 2048, 25),
)


@dataclass(frozen=True)
class Loop:
    """Main loop of a product: instructions a lane (all, of them LOP3 and SHF at half rate, IMMA) for `weights` a lane
    and `tokens` at once.
    """

    tokens: int
    weights: int
    all: int
    half_rate: int
    imma: int


# Counted with nvdisasm on sm_80. Up to 64 tokens a warp keeps all tokens of its rows.
BITS = (Loop(8, 256, 106, 72, 16), Loop(16, 256, 184, 121, 32), Loop(32, 1024, 1014, 487, 256))
INT8 = (Loop(8, 128, 73, 0, 8), Loop(16, 128, 113, 1, 16), Loop(32, 128, 297, 0, 32))

# A warp's instructions in one decode step of the scan, and the warps of one batch row and layer of 64 heads.
SCAN = {"fp32": (450, 512, 4), "fp16": (450, 512, 2), "int8": (1250, 256, 1)}


# Sequences up to which the product of a 1.3B in_proj convolves its columns itself, and more of which take a node more.
CONVOLVED = 64


def product(gpu: Gpu, n: int, K: int, M: int, bits: bool, rank: int = 16, fused: float = 0) -> float:
    """Seconds of BinaryScaffoldMatMul (`bits`) or Int8MatMul for n tokens, two nodes; of a product that other ops are
    fused into, which move `fused` bytes besides.
    """
    loop = next((loop for loop in (BITS if bits else INT8) if n <= loop.tokens), (BITS if bits else INT8)[-1])
    passes = K * M / (32 * loop.weights) * math.ceil(n / loop.tokens)
    issue = 4 * gpu.sms * gpu.clock
    compute = passes * max(
        loop.imma * 16 * 8 * 32 / (gpu.int8_macs * gpu.sms * gpu.clock), 2 * loop.half_rate / issue, loop.all / issue
    )
    moved = product_bytes(n, K, M, bits, rank) + fused
    return 2 * NODE + max(moved / (BANDWIDTH_SHARE * gpu.bandwidth), compute)


def product_bytes(n: int, K: int, M: int, bits: bool, rank: int = 16) -> float:
    """Bytes from and to memory: weights, scales and low rank once, x read and y written in fp32."""
    low_rank = rank * (K + M + 4) + 4 * M if bits else 0
    return K * M / (8 if bits else 1) + 4 * M + low_rank + 4 * n * (K + M)


def streaming(gpu: Gpu, size: float) -> float:
    """Seconds of a node that is bound by `size` bytes."""
    return NODE + size / (BANDWIDTH_SHARE * gpu.bandwidth)


def scan(gpu: Gpu, batch: int, state: str, H: int = 64, P: int = 64, N: int = 128) -> float:
    """Seconds of SelectiveScanStep at T = 1."""
    instructions, warps, _ = SCAN[state]
    compute = batch * warps * instructions / (ISSUE_SHARE * 4 * gpu.sms * gpu.clock)
    return NODE + max(batch * scan_bytes(state, H, P, N) / (BANDWIDTH_SHARE * gpu.bandwidth), compute)


def scan_bytes(state: str, H: int = 64, P: int = 64, N: int = 128) -> float:
    """Bytes of one batch row and layer: the state both ways, its scales, x, y, dt, B and C."""
    scales = 2 * H * N * 4 if state == "int8" else 0
    return 2 * H * N * P * SCAN[state][2] + scales + 4 * (2 * H * P + H + 2 * N)


def step(gpu: Gpu, batch: int, state: str) -> float:
    """Seconds of one decode step of the 1.3B shape, one CUDA graph: five nodes a layer, then norm and head."""
    D, inner, conv, heads, layers, vocabulary = 2048, 4096, 4352, 64, 48, 50288
    # Fused into in_proj: weights of norm and convolution, the latter's state both ways. Into out_proj: weights of the
    # norm, gate, residual.
    layer = (
        product(gpu, batch, D, inner + conv + heads, bits=True, fused=4 * (D + 5 * conv + batch * 2 * 3 * conv))
        + scan(gpu, batch, state)
        + product(gpu, batch, inner, D, bits=True, fused=4 * (inner + batch * (inner + D)))
    )
    if batch > CONVOLVED:
        layer += streaming(gpu, 8 * batch * conv)
    return layers * layer + streaming(gpu, 8 * batch * D) + product(gpu, batch, D, vocabulary, bits=False)


def _table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'-|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    names = [gpu.name for gpu in GPUS]
    products = (("in_proj", 2048, 8512, True), ("out_proj", 4096, 2048, True), ("head", 2048, 50288, False))
    rows = []
    for n in BATCHES:
        for name, K, M, bits in products:
            times = [f"{product(gpu, n, K, M, bits) * 1e6:.1f}" for gpu in GPUS]
            rows.append([str(n), name, f"{product_bytes(n, K, M, bits) / 1e6:.2f}", *times])
    _table("Products, us", ["n", "product", "MB", *names], rows)
    _table(
        "Scan of one layer, us",
        ["batch", "state", "MB", *names],
        [
            [str(b), state, f"{b * scan_bytes(state) / 1e6:.2f}", *(f"{scan(g, b, state) * 1e6:.1f}" for g in GPUS)]
            for b in BATCHES
            for state in SCAN
        ],
    )
    for state in SCAN:
        _table(
            f"Tokens/s of the 1.3B shape, {state} states",
            ["batch", *names],
            [[str(b), *(f"{b / step(g, b, state):,.0f}" for g in GPUS)] for b in BATCHES],
        )
    _table(
        "Jetson, 1.3B, batch 1: tokens/s (mJ a token, at most)",
        ["states", *(gpu.name for gpu in JETSONS)],
        [
            [state, *(f"{1 / step(g, 1, state):.0f} ({1e3 * g.watts * step(g, 1, state):.0f})" for g in JETSONS)]
            for state in SCAN
        ],
    )


if __name__ == "__main__":
    main()
