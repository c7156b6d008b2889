"""The stock-ONNX-Runtime peer: a Mamba-2 decoder of the same shape from nothing but operators ORT ships.

Projections are `com.microsoft::MatMulNBits` with 2-bit weights (`accuracy_level=4`: int8 activations; any
other level is several hundred times slower), the recurrence is `com.microsoft::CausalConvWithState` and
`com.microsoft::LinearAttention(update_rule="gated", scale=1)`, which with query = C, key = B, value = dt*x
and decay = -exp(A_log)*dt is the Mamba-2 recurrence. The weights are random: this graph is for timing only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from dfssm.model.config import DFSSMConfig

from .peer import Peer

BLOCK = 128  # of 32 and 64, 128: the fastest, and the fewest bytes

# Session options that may make it faster, and rounds in which they are tried.
OPTIONS = ("mlas.use_lut_gemm",)
TRIALS = 3

MS = "com.microsoft"
F32 = ir.DataType.FLOAT
PAGE = 4096  # alignment of the weights, each of which then is mapped where it lies


def build_peer(config: dict, folder: Path, head_bits: int = 0) -> Path:
    """Write the peer graph of `config` (keys of `Mamba2Config`) and its weights; return the .onnx path.

    `head_bits`: 0 = no LM head (the output is the last hidden row), else 8 or 4 = a MatMulNBits head.
    Inputs: input_ids i64[B,T], conv_state.{i} f32[B,W-1,C], ssm_state.{i} f32[B,H,N,P]; the outputs are named
    as those of the step graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "peer.onnx"
    model = _Graph(DFSSMConfig.from_dict(config), np.random.default_rng(0)).model(head_bits)
    data = f"{path.name}.data"
    ir.save(model, path, external_data=data, size_threshold_bytes=PAGE, alignment=PAGE, align_threshold=0)
    return path


def open_best(config: dict, folder: Path, threads: int, head_bits: int) -> Peer:
    """The fastest of the peers with and without each of OPTIONS, by a short trial in turns."""
    path = build_peer(config, folder, head_bits)
    trials = {option: open_peer(path, threads, option) for option in ("", *OPTIONS)}
    rates: dict[str, list[float]] = {option: [] for option in trials}
    for _ in range(TRIALS):
        for option, peer in trials.items():
            time.sleep(0.1)  # the threads of the one before spin so long
            peer.decode(1)
            rates[option].append(4 / peer.decode(4))
    medians = {option: float(np.median(rate)) for option, rate in rates.items()}
    best = trials[max(medians, key=medians.__getitem__)]
    tried = ", ".join(f"{option or 'none'} {rate:.1f}" for option, rate in medians.items())
    best.options += f"; session options tried, tok/s: {tried}"
    return best


def open_peer(path: Path, threads: int, option: str = "") -> Peer:
    """Open the peer of `build_peer` with a session option set to 1. Its states are in place, like ours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if option:
        options.add_session_config_entry(option, "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    width = next(tensor.shape[-1] for tensor in session.get_outputs() if tensor.name == "logits")

    def run(tokens: int, times: int) -> float:
        """Seconds of `times` runs of `tokens` tokens, from a state of zeros."""
        binding = session.io_binding()
        held = []  # the binding holds addresses only

        def bind(method: str, name: str, array: np.ndarray) -> None:
            held.append(array)
            getattr(binding, method)(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        for tensor in session.get_inputs():
            sizes = {"B": 1, "T": tokens}
            shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
            # full touches the pages, which zeros leaves to the first run
            array = np.full(shape, 0, np.int64 if tensor.name == "input_ids" else np.float32)
            bind("bind_input", tensor.name, array)
            if tensor.name != "input_ids":
                bind("bind_output", tensor.name.replace(".", "_out."), array)
        bind("bind_output", "logits", np.empty((1, 1, width), np.float32))
        start = time.perf_counter()
        for _ in range(times):
            session.run_with_iobinding(binding)
        seconds = time.perf_counter() - start
        assert all(np.isfinite(array).all() for array in held), "the peer's numbers overflowed"
        return seconds

    return Peer(
        lambda tokens: run(1, tokens),
        lambda tokens: run(tokens, 1),
        f"MatMulNBits of 2 bits in blocks of {BLOCK}, accuracy level 4" + (f", {option}" if option else ""),
    )


class _Graph(ir.tape.Tape):
    def __init__(self, config: DFSSMConfig, rng: np.random.Generator):
        super().__init__()
        self.c, self.rng = config, rng
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def model(self, head_bits: int) -> ir.Model:
        c = self.c
        ids = ir.val("input_ids", ir.DataType.INT64, ("B", "T"))
        # int8 rows, one scale a row, as in the student: the table that the lookup reads is no larger than
        # ours
        table = self.weight("embedding", self.rng.integers(-127, 128, (c.vocab_size, c.d_model), np.int8))
        rows = self.op("Cast", [self.op("Gather", [table, ids])], {"to": F32})
        h = self.op("Mul", [rows, self.weight("embedding_scale", np.float32(1 / 127))])
        for i in range(c.n_layer):
            h = self.op("Add", [h, self.layer(i, h)])
        # as in the step graph, only the last token goes on to the norm and the head
        last = self.weight("last", np.array([-1]))
        h = self.norm("norm_f", self.op("Gather", [h, last], {"axis": 1}), c.d_model)
        out = self.linear("lm_head", h, c.vocab_size, c.d_model, head_bits) if head_bits else h
        width = c.vocab_size if head_bits else c.d_model
        logits = self.op("Identity", [out], output=ir.val("logits", F32, ("B", 1, width)))
        graph = ir.Graph(
            [ids, *self.inputs],
            [logits, *self.outputs],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": 21, MS: 1},
            name="stock_mamba2",
        )
        return ir.Model(graph, ir_version=10)

    def layer(self, i: int, h: ir.Value) -> ir.Value:
        c, name = self.c, f"layers.{i}"
        u = self.norm(f"{name}.norm", h, c.d_model)
        zxbcdt = self.linear(f"{name}.in_proj", u, c.d_in_proj, c.d_model, 2)
        z, xbc, dt = self.split(name, zxbcdt, [c.d_inner, c.conv_dim, c.nheads])

        conv_weight = self.weight(f"{name}.conv", self.normal((c.conv_dim, 1, c.d_conv), c.d_conv))
        conv_bias = self.weight(f"{name}.conv_bias", np.zeros(c.conv_dim, np.float32))
        xbc = self.stateful(
            "CausalConvWithState",
            [xbc, conv_weight, conv_bias],
            [],
            f"conv_state.{i}",
            ("B", c.d_conv - 1, c.conv_dim),
            {"activation": "silu", "channels_last": 1, "ndim": 1},
        )
        x, b, cc = self.split(f"{name}.xbc", xbc, [c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state])

        dt_bias = self.weight(f"{name}.dt_bias", np.full(c.nheads, math.log(math.expm1(0.01)), np.float32))
        minus_a = self.weight(f"{name}.A", -self.rng.uniform(1, 16, c.nheads).astype(np.float32))
        dt = self.op("Softplus", [self.op("Add", [dt, dt_bias])])
        by_head = self.weight(f"{name}.by_head", np.array([0, 0, c.nheads, c.headdim]))
        flat = self.weight(f"{name}.flat", np.array([0, 0, c.d_inner]))
        last = self.weight(f"{name}.last", np.array([-1]))
        xh = self.op("Reshape", [x, by_head])
        value = self.op("Reshape", [self.op("Mul", [xh, self.op("Unsqueeze", [dt, last])]), flat])
        y = self.stateful(
            "LinearAttention",
            [cc, b, value],
            [self.op("Mul", [dt, minus_a])],
            f"ssm_state.{i}",
            ("B", c.nheads, c.d_state, c.headdim),
            {"update_rule": "gated", "scale": 1.0, "q_num_heads": c.ngroups, "kv_num_heads": c.nheads},
        )
        skip = self.weight(f"{name}.D", np.ones((c.nheads, 1), np.float32))
        y = self.op("Add", [y, self.op("Reshape", [self.op("Mul", [xh, skip]), flat])])
        gate = self.op("Mul", [z, self.op("Sigmoid", [z])])
        y = self.norm(f"{name}.gated_norm", self.op("Mul", [y, gate]), c.d_inner)
        return self.linear(f"{name}.out_proj", y, c.d_model, c.d_inner, 2)

    def linear(self, name: str, x: ir.Value, rows: int, columns: int, bits: int) -> ir.Value:
        blocks = math.ceil(columns / BLOCK)
        packed = self.rng.integers(0, 256, (rows, blocks, BLOCK * bits // 8), np.uint8)
        # weights are uniform over 2**bits levels: this scale keeps the output's variance near the input's
        scale = np.full((rows, blocks), 2 / (2**bits * math.sqrt(columns)), np.float32)
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        inputs = [x, self.weight(name, packed), self.weight(f"{name}.scales", scale)]
        return self.op("MatMulNBits", inputs, sizes, domain=MS)

    def norm(self, name: str, x: ir.Value, width: int) -> ir.Value:
        weight = self.weight(name, np.ones(width, np.float32))
        attributes = {"axis": -1, "epsilon": self.c.norm_eps, "stash_type": 1}
        return self.op("SimplifiedLayerNormalization", [x, weight], attributes)

    def split(self, name: str, x: ir.Value, sizes: list[int]) -> Sequence[ir.Value]:
        parts = [ir.val(f"{name}.part{k}") for k in range(len(sizes))]
        return self.op_multi_out(
            "Split", [x, self.weight(f"{name}.sizes", np.array(sizes))], {"axis": -1}, outputs=parts
        )

    def stateful(self, kind: str, before: list, behind: list, state: str, shape: tuple, attributes: dict) -> ir.Value:
        """The output of an op that has a state among its inputs, and the new one as its second output."""
        old, new = ir.val(state, F32, shape), ir.val(state.replace(".", "_out."), F32, shape)
        self.inputs.append(old)
        self.outputs.append(new)
        outputs = [ir.val(f"{state}.y"), new]
        return self.op_multi_out(kind, [*before, old, *behind], attributes, domain=MS, outputs=outputs)[0]

    def normal(self, shape: tuple, fan_in: int) -> np.ndarray:
        return (self.rng.standard_normal(shape) / math.sqrt(fan_in)).astype(np.float32)

    def weight(self, name: str, array) -> ir.Value:
        return self.initializer(ir.tensor(np.asarray(array), name=name))
