"""What decode steps and prompts should take on GPUs that were not at hand: predicted from bytes and instructions.

    python -m dfssm.bench.gpu                            the tables
    python -m dfssm.bench.gpu docs/gpu.md docs/jetson.md  puts them into the documents

A kernel's time is that of its launch and the longest of what it asks of the memory, the tensor cores and the issue
slots. Bytes follow from the shapes; instructions were counted in the machine code, those of prefill scans in the source
(docs/gpu.md says how); nothing was fitted.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dfssm.base import DfssmError, files

BATCHES = (1, 8, 32, 128, 512)
PROMPTS = (64, 128, 256, 512, 1024, 2048)

# Share of the nominal bandwidth that streaming kernels reach, and of the issue slots that a kernel of many warps fills.
BANDWIDTH_SHARE, ISSUE_SHARE = 0.85, 0.7

# Seconds of a launch that depends on the one before, in a CUDA graph: the launch, and dependent trips to memory.
LAUNCH = 3e-6

# Blocks an SM up to which a product of one token is one launch (plugins/trt/common/one_token.cuh).
ONE_TOKEN_WAVES = 3

# Bytes a clock that an SM draws from L2.
L2_BYTES = 64


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: bytes/s, SMs, Hz, int8 multiply-adds a clock and SM (mma.sync, dense; fp16: half of it).
    `copied`: bytes/s of a copy, both directions, where it was measured; `watts`: the power budget of a module.
    """

    name: str
    bandwidth: float
    sms: int
    clock: float
    int8_macs: float
    copied: float = 0.0
    watts: float = math.nan

    def memory(self, size: float, blocks: float = math.inf) -> float:
        """Seconds for `size` bytes. An SM without a block draws nothing."""
        return size / ((self.copied or BANDWIDTH_SHARE * self.bandwidth) * min(1.0, blocks / self.sms))


GPUS = (
    Gpu("A100 40GB", 1555e9, 108, 1.41e9, 2048),
    Gpu("L4", 300e9, 58, 2.04e9, 1024),
    Gpu("H100 SXM", 3350e9, 132, 1.755e9, 0.6 * 4096),  # mma.sync reaches some 60 % of what wgmma does
    Gpu("H200", 4800e9, 132, 1.755e9, 0.6 * 4096, 4300e9),
    Gpu("RTX 4090", 1008e9, 128, 2.52e9, 1024),
    Gpu("RTX 5090", 1792e9, 170, 2.41e9, 1024),
    Gpu("Orin AGX", 205e9, 16, 1.3e9, 2048),
)

# Their largest budgets; of Orin NX and Nano those of the mode "Super".
JETSONS = (
    Gpu("Thor T5000", 273e9, 20, 1.57e9, 2048, watts=130),
    Gpu("AGX Orin 64GB", 205e9, 16, 1.3e9, 2048, watts=60),
    Gpu("Orin NX 16GB", 102e9, 8, 1.17e9, 2048, watts=40),
    Gpu("Orin Nano 8GB", 102e9, 8, 1.02e9, 2048, watts=25),
)


@dataclass(frozen=True)
class Design:
    """What the kernels do. `one_token`: a product of one token is one launch; `chunked`: prompts of 32 tokens and more
    are scanned on the tensor cores; `convolving`: a product convolves its columns, however many the tokens.
    """

    one_token: bool = True
    chunked: bool = True
    convolving: bool = True


NOW = Design()


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


# A warp's instructions for a token of a prompt, one after another, four warps a block; in chunks, for 32 tokens, eight
# warps a block, with the clocks that barriers and chains of dependent instructions leave empty. By headdim of a block.
SEQUENTIAL = 145
CHUNK = {32: (1000, 600), 64: (1500, 600)}
CHUNK_MMA = {32: 576, 64: 1008}
CHUNK_SHARED = {32: 308e3, 64: 470e3}  # bytes to and from shared memory, 128 a clock

# A lane's instructions for one output that a product convolves, and before that was its own up to so many sequences.
CONVOLVE = 45
CONVOLVED = 64


def product(gpu: Gpu, n: int, K: int, M: int, bits: bool, rank: int = 16, fused: float = 0, sequence: int = 0) -> float:
    """Seconds of BinaryScaffoldMatMul (`bits`) or Int8MatMul for n tokens, two launches; of a product that other ops
    are fused into, which move `fused` bytes besides. `sequence`: the tokens of each that it convolves.
    """
    loop = next((loop for loop in (BITS if bits else INT8) if n <= loop.tokens), (BITS if bits else INT8)[-1])
    passes = K * M / (32 * loop.weights) * math.ceil(n / loop.tokens) * _made_again(n, M, sequence)
    blocks = product_blocks(n, M) * _made_again(n, M, sequence)
    sms = min(gpu.sms, blocks)
    issue = 4 * sms * gpu.clock
    convolution = n * CONV / 32 * CONVOLVE / (ISSUE_SHARE * issue) if sequence else 0.0
    compute = max(
        passes * loop.imma * 16 * 8 * 32 / (gpu.int8_macs * sms * gpu.clock),
        passes * 2 * loop.half_rate / issue,
        passes * loop.all / issue + convolution,
    )
    memory = gpu.memory(product_bytes(n, K, M, bits, rank) + fused, blocks)
    # Two blocks share an SM: the others multiply meanwhile, but none after the last.
    return 2 * LAUNCH + max(memory, compute) + convolution / max(1.0, blocks / (2 * gpu.sms))


def one_token_product(
    gpu: Gpu, K: int, M: int, rows: int, gated: bool, rank: int = 16, fused: float = 0, sequence: int = 0
) -> float:
    """Seconds of the product of one normed token in one launch, blocks of `rows` rows: each reads the activations, the
    weight of the norm and `down` from L2. Where an SM has too many blocks for that: in two.
    """
    two = product(gpu, 1, K, M, True, rank, fused, sequence)
    if math.ceil(M / rows) > ONE_TOKEN_WAVES * gpu.sms:
        return two
    repeated = 4 * K * (3 if gated else 2) + rank * K
    return two - LAUNCH + math.ceil(M / rows / gpu.sms) * repeated / (L2_BYTES * gpu.clock)


def product_tile(n: int, M: int) -> tuple[int, int]:
    """Rows and tokens of a product's block (plugins/trt/common/matmul.cuh)."""
    if n <= 16:
        return 16, 16
    if math.ceil(M / 128) * math.ceil(n / 64) >= 200:
        return 128, 64
    return (32, 32) if n <= 64 else (64, 64)


def product_blocks(n: int, M: int) -> int:
    rows, tokens = product_tile(n, M)
    return math.ceil(M / rows) * math.ceil(n / tokens)


def _made_again(n: int, M: int, sequence: int) -> float:
    """Tiles of tokens against those of a product that convolves none: a block has whole sequences or, of a longer one,
    the three tokens before its own, too.
    """
    if not sequence:
        return 1.0
    _, tokens = product_tile(n, M)
    whole = tokens // sequence * sequence
    tiles = math.ceil(n / whole) if whole else n / sequence * math.ceil(sequence / (tokens - 3))
    return tiles / math.ceil(n / tokens)


def product_bytes(n: int, K: int, M: int, bits: bool, rank: int = 16) -> float:
    """Bytes from and to memory: weights, scales and low rank once, x read and y written in fp32."""
    low_rank = rank * (K + M + 4) + 4 * M if bits else 0
    return K * M / (8 if bits else 1) + 4 * M + low_rank + 4 * n * (K + M)


def streaming(gpu: Gpu, size: float) -> float:
    """Seconds of a launch that is bound by `size` bytes."""
    return LAUNCH + gpu.memory(size)


def slices(state: str, batch: int, H: int = 64, P: int = 64) -> int:
    """Blocks of a scan: 32 columns each, but int8 rows are whole."""
    return batch * H * (1 if state == "int8" else P // 32)


def scan(gpu: Gpu, batch: int, state: str, H: int = 64, P: int = 64, N: int = 128) -> float:
    """Seconds of SelectiveScanStep at T = 1."""
    instructions, warps, _ = SCAN[state]
    blocks = slices(state, batch, H, P)
    compute = batch * warps * instructions / (ISSUE_SHARE * 4 * min(gpu.sms, blocks) * gpu.clock)
    return LAUNCH + max(gpu.memory(batch * scan_bytes(state, H, P, N), blocks), compute)


def scan_prompt(gpu: Gpu, tokens: int, state: str, design: Design = NOW, H: int = 64, P: int = 64) -> float:
    """Seconds of SelectiveScanStep for a prompt of one sequence. A block goes through it alone: SMs that have one block
    more than others decide. (int8 states have whole rows, with twice the columns of a block.)
    """
    blocks, columns = slices(state, 1, H, P), 64 if state == "int8" else 32
    rounds = math.ceil(blocks / gpu.sms)
    if not design.chunked or tokens < 32:
        clocks = tokens * SEQUENTIAL * columns / 32 / ISSUE_SHARE
    else:
        instructions, empty = CHUNK[columns]
        tensor = CHUNK_MMA[columns] * 16 * 8 * 16 / (gpu.int8_macs / 2)
        busy = max(2 * instructions / ISSUE_SHARE, tensor, CHUNK_SHARED[columns] / 128)
        clocks = math.ceil(tokens / 32) * (busy + empty)
    return LAUNCH + rounds * clocks / gpu.clock


def scan_bytes(state: str, H: int = 64, P: int = 64, N: int = 128) -> float:
    """Bytes of one batch row and layer: the state both ways, its scales, x, y, dt, B and C."""
    scales = 2 * H * N * 4 if state == "int8" else 0
    return 2 * H * N * P * SCAN[state][2] + scales + 4 * (2 * H * P + H + 2 * N)


D, INNER, CONV, HEADS, LAYERS, VOCABULARY = 2048, 4096, 4352, 64, 48, 50288
WIDE = INNER + CONV + HEADS


def _fused(n: int, sequences: int) -> tuple[float, float]:
    """Bytes that in_proj and out_proj move for what is fused into them: weights of norm and convolution, the latter's
    state both ways; weights of the norm, gate, residual.
    """
    return 4 * (D + 5 * CONV + sequences * 2 * 3 * CONV), 4 * (INNER + n * (INNER + D))


def _in_proj(gpu: Gpu, n: int, sequences: int, design: Design) -> float:
    """Seconds of norm, in_proj and convolution in two launches; in three where the product does not convolve."""
    into, _ = _fused(n, sequences)
    if design.convolving or n == sequences <= CONVOLVED:
        return product(gpu, n, D, WIDE, True, fused=into, sequence=n // sequences)
    convolution = max(gpu.memory(8 * n * CONV), n * CONV / 32 * CONVOLVE / (ISSUE_SHARE * 4 * gpu.sms * gpu.clock))
    return product(gpu, n, D, WIDE, True, fused=into) + LAUNCH + convolution


def _head(gpu: Gpu, n: int) -> float:
    return streaming(gpu, 8 * n * D) + product(gpu, n, D, VOCABULARY, bits=False)


def step(gpu: Gpu, batch: int, state: str, design: Design = NOW) -> float:
    """Seconds of one decode step of the 1.3B shape, one CUDA graph: three launches a layer at batch 1, five at more;
    then norm and head.
    """
    into, out_of = _fused(batch, batch)
    if batch == 1 and design.one_token:
        products = one_token_product(gpu, D, WIDE, 64, gated=False, fused=into, sequence=1)
        products += one_token_product(gpu, INNER, D, 16, gated=True, fused=out_of)
    else:
        products = _in_proj(gpu, batch, batch, design) + product(gpu, batch, INNER, D, True, fused=out_of)
    return LAYERS * (products + scan(gpu, batch, state)) + _head(gpu, batch)


def prefill(gpu: Gpu, tokens: int, state: str, design: Design = NOW) -> float:
    """Seconds of a prompt of the 1.3B shape: five launches a layer, then norm and head of the last token."""
    _, out_of = _fused(tokens, 1)
    layer = _in_proj(gpu, tokens, 1, design) + scan_prompt(gpu, tokens, state, design)
    layer += product(gpu, tokens, INNER, D, True, fused=out_of)
    return LAYERS * layer + _head(gpu, 1)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{'-|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)])


CHANGES = (
    ("before", Design(one_token=False, chunked=False, convolving=False)),
    ("scan in chunks", Design(one_token=False, convolving=False)),
    ("and one launch for a product of one token", Design(convolving=False)),
    ("and the convolution in the product", NOW),
)


def tables() -> dict[str, str]:
    """Name -> table in Markdown, for the places of that name in the documents."""
    names = [gpu.name for gpu in GPUS]
    h200 = next(gpu for gpu in GPUS if gpu.name == "H200")
    products = (("in_proj", D, WIDE, True), ("out_proj", INNER, D, True), ("head", D, VOCABULARY, False))
    found = {
        "products": _table(
            ["n", "product", "MB", *names],
            [
                [str(n), name, f"{product_bytes(n, K, M, bits) / 1e6:.2f}"]
                + [f"{product(gpu, n, K, M, bits) * 1e6:.1f}" for gpu in GPUS]
                for n in BATCHES
                for name, K, M, bits in products
            ],
        ),
        "scan": _table(
            ["batch", "state", "MB", *names],
            [
                [str(b), state, f"{b * scan_bytes(state) / 1e6:.2f}", *(f"{scan(g, b, state) * 1e6:.1f}" for g in GPUS)]
                for b in BATCHES
                for state in SCAN
            ],
        ),
        "scan of a prompt": _table(
            ["tokens", "scan", *names],
            [
                [str(tokens), name, *(f"{scan_prompt(gpu, tokens, 'fp16', design) * 1e6:.0f}" for gpu in GPUS)]
                for tokens in PROMPTS
                for name, design in (("sequential", CHANGES[0][1]), ("in chunks", NOW))
            ],
        ),
        "changes": _table(
            ["version", "", *names],
            [
                [name, what, *(f"{seconds(gpu) * 1e3:.2f}" for gpu in GPUS)]
                for name, design in CHANGES
                for what, seconds in (
                    ("step, batch 1", lambda gpu, design=design: step(gpu, 1, "fp16", design)),
                    ("prompt of 512", lambda gpu, design=design: prefill(gpu, 512, "fp16", design)),
                )
            ],
        ),
        "h200": _table(
            ["state", *(f"step, batch {b}" for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))],
            [
                [state, *(f"{step(h200, b, state) * 1e3:.2f}" for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))]
                for state in SCAN
            ],
        ),
        "h200 prompts": _table(
            ["version", *(f"{tokens} tokens" for tokens in PROMPTS)],
            [
                [name, *(f"{prefill(h200, tokens, 'fp16', design) * 1e3:.2f}" for tokens in PROMPTS)]
                for name, design in (("before", CHANGES[0][1]), ("now", NOW))
            ],
        ),
        "jetson": _table(
            ["states", *(f"{gpu.name}, {gpu.watts} W" for gpu in JETSONS)],
            [
                [state, *(f"{1 / step(g, 1, state):.0f} ({1e3 * g.watts * step(g, 1, state):.0f})" for g in JETSONS)]
                for state in SCAN
            ],
        ),
    }
    for state in SCAN:
        rows = [[str(b), *(f"{b / step(gpu, b, state):,.0f}" for gpu in GPUS)] for b in BATCHES]
        found[f"tokens/s, {state}"] = _table(["batch", *names], rows)
    return found


PLACE = re.compile(r"(<!-- predicted: (.*?) -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """`text` with every table in its place, between `<!-- predicted: NAME -->` and `<!-- end -->`. DfssmError for a
    name that no table has.
    """
    made = tables()

    def table(match: re.Match) -> str:
        if match[2] not in made:
            raise DfssmError(f"there is no table '{match[2]}': choose one of {', '.join(made)}")
        return match[1] + made[match[2]]

    return PLACE.sub(table, text)


def main() -> None:
    if not sys.argv[1:]:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables().items()))
    for name in sys.argv[1:]:
        files.write_file(name, filled(Path(name).read_text()))


if __name__ == "__main__":
    main()
