"""The shared case table: one list of inputs drives the tests of every backend of every op.

A case names the sizes; `inputs()` draws the tensors from the case's own seed, so every backend sees the same numbers.
Sizes go past every tile edge (rows 16 and 32, columns 32, lanes 8 and 16): just under, at, just over.
"""

import zlib
from dataclasses import dataclass, field

import numpy as np

from .packing import pack_bits, to_row16, up_to_row16
from .reference import quantize_state_ref
from .schema import LAYOUT_ROW16

F32 = np.float32


@dataclass(frozen=True)
class Case:
    """One set of inputs of one op; `attributes` are the node's, `sizes` what the tensors are drawn with."""

    op: str
    sizes: dict
    attributes: dict = field(default_factory=dict)
    kind: str = "normal"

    @property
    def id(self) -> str:
        parts = [f"{k}{v}" for k, v in {**self.sizes, **self.attributes}.items()]
        return "-".join([self.op, *parts, *([] if self.kind == "normal" else [self.kind])])

    @property
    def state_dtype(self) -> str:
        return self.sizes.get("state", "float32")

    def inputs(self) -> dict[str, np.ndarray]:
        """The op's inputs by name, absent optional ones left out. Columns that the op must not read are NaN."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        inputs = _DRAW[self.op](rng, self.attributes, self.kind, **self.sizes)
        for name, value in inputs.items():
            inputs[name] = _in_wider(value, self.attributes.get(f"{name}_start", -1))
        return inputs


def _in_wider(value: np.ndarray, start: int) -> np.ndarray:
    """`value` as the columns from `start` on of a wider tensor; none, one, two or three more follow."""
    if start < 0:
        return value
    edges = [(0, 0)] * (value.ndim - 1) + [(start, (start + 1) % 4)]
    return np.pad(value, edges, constant_values=np.nan)


def _activations(rng, shape, kind) -> np.ndarray:
    """Normal numbers, or the kinds that hurt quantisation: all zero, denormal, huge, exact ties of rounding."""
    x = rng.standard_normal(shape).astype(F32)
    if kind == "zero":
        x[:] = 0
    elif kind == "tiny":
        x *= F32(1e-32)  # below TINY: counts as zero
    elif kind == "huge":
        x *= F32(1e30)
    elif kind == "ties":  # max 127, so inv = 1 and every half is a tie
        x = (rng.integers(-253, 254, shape) / 2).astype(F32)
        x[..., 0] = 127
    return x


def _int8(rng, *shape) -> np.ndarray:
    return rng.integers(-127, 128, shape, dtype=np.int8)


def _scaffold(rng, attributes, kind, B, T, K, M, R):
    planes = attributes.get("planes", 1)
    lead = (planes,) if planes > 1 else ()
    bits = pack_bits(rng.standard_normal((*lead, M, K)).astype(F32))
    up = _int8(rng, M, R)
    if attributes.get("layout", 0) == LAYOUT_ROW16:
        bits, up = to_row16(bits), up_to_row16(up)
    return {
        "x": _activations(rng, (B, T, K), kind),
        "bits": bits,
        "scale": rng.uniform(0.01, 0.1, (*lead, M)).astype(F32),
        "down": _int8(rng, R, K),
        "down_scale": rng.uniform(1e-4, 1e-3, R).astype(F32),
        "up": up,
        "up_scale": rng.uniform(1e-3, 1e-2, M).astype(F32),
    }


def _int8_matmul(rng, attributes, kind, B, T, K, M):
    x = _activations(rng, (B, T, K), kind)
    return {"x": x, "w": _int8(rng, M, K), "w_scale": rng.uniform(1e-4, 1e-2, M).astype(F32)}


def _conv(rng, attributes, kind, B, T, C, W):
    return {
        "x": rng.standard_normal((B, T, C)).astype(F32),
        "state": rng.standard_normal((B, C, W - 1)).astype(F32),
        "weight": rng.standard_normal((C, W)).astype(F32),
        "bias": rng.standard_normal(C).astype(F32),
    }


def _scan(rng, attributes, kind, B, T, H, P, N, state="float32"):
    groups = attributes.get("ngroups", 1)
    h = rng.standard_normal((B, H, N, P)).astype(F32)
    h[:, :, :1] = 0  # rows of a fresh state
    inputs = {
        "x": rng.standard_normal((B, T, H * P)).astype(F32),
        "dt": rng.standard_normal((B, T, H)).astype(F32),
        "B": rng.standard_normal((B, T, groups * N)).astype(F32),
        "C": rng.standard_normal((B, T, groups * N)).astype(F32),
        "A_log": np.log(rng.uniform(1, 16, H)).astype(F32),
        "D": rng.standard_normal(H).astype(F32),
        # softplus of -7 .. -2: time steps of 0.001 .. 0.1, as trained models have
        "dt_bias": rng.uniform(-7, -2, H).astype(F32),
        "state": h.astype(state),
    }
    if kind == "extreme":  # softplus far out on both sides
        inputs["dt"] *= F32(30)
    if state == "int8":
        inputs["state"], inputs["state_scale"] = quantize_state_ref(h)
    return inputs


def _norm(rng, attributes, kind, B, T, C):
    x = _activations(rng, (B, T, C), kind)
    return {"x": x, "weight": rng.uniform(0.5, 2, C).astype(F32)}


def _gated_norm(rng, attributes, kind, B, T, C):
    z = (rng.standard_normal((B, T, C)) * 3).astype(F32)
    if kind == "saturated":
        z *= F32(40)  # exp(-z) overflows fp32
    y, weight = _activations(rng, (B, T, C), kind), rng.uniform(0.5, 2, C).astype(F32)
    return {"y": y, "z": z, "weight": weight}


_DRAW = {
    "BinaryScaffoldMatMul": _scaffold,
    "Int8MatMul": _int8_matmul,
    "CausalConv1dStep": _conv,
    "SelectiveScanStep": _scan,
    "GatedRMSNorm": _gated_norm,
    "RMSNorm": _norm,
}


def _sizes(names: str, *rows) -> list[dict]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def _scaffold_cases():
    shapes = _sizes(
        "B T K M R",
        (1, 1, 32, 1, 0),
        (1, 1, 64, 16, 1),
        (1, 1, 96, 15, 2),
        (1, 1, 256, 40, 16),
        (1, 1, 1024, 33, 5),
        (3, 1, 128, 48, 4),
        (1, 2, 160, 17, 3),
        (1, 7, 64, 32, 2),
        (3, 5, 96, 31, 16),
        (1, 12, 128, 64, 4),
        (1, 13, 32, 49, 1),
        (1, 64, 288, 80, 8),
        (2, 33, 512, 16, 0),
    )
    for layout in (0, LAYOUT_ROW16):
        for sizes in shapes:
            yield Case("BinaryScaffoldMatMul", sizes, {"layout": layout})
        for sizes in (shapes[3], shapes[8]):
            yield Case("BinaryScaffoldMatMul", sizes, {"layout": layout, "planes": 2})
        yield Case("BinaryScaffoldMatMul", shapes[6], {"layout": layout, "planes": 3})
        for kind in ("zero", "tiny", "huge", "ties"):
            yield Case("BinaryScaffoldMatMul", shapes[8], {"layout": layout}, kind)


def _int8_cases():
    shapes = _sizes(
        "B T K M",
        *[(1, 1, 32, 1), (1, 1, 64, 4), (1, 1, 100, 7), (1, 1, 1, 5), (1, 1, 2048, 19), (3, 1, 96, 33)],
        *[(1, 2, 64, 8), (2, 3, 33, 18), (1, 13, 130, 21), (1, 64, 192, 35)],
    )
    for sizes in shapes:
        yield Case("Int8MatMul", sizes)
    for kind in ("zero", "tiny", "huge", "ties"):
        yield Case("Int8MatMul", shapes[7], kind=kind)


def _conv_cases():
    for width in (2, 3, 4):
        for batch, tokens, channels in (
            (1, 1, 1),
            (1, 1, 33),
            (3, 1, 16),
            (1, 2, 40),
            (2, 3, 17),
            (3, 7, 96),
        ):
            yield Case("CausalConv1dStep", dict(B=batch, T=tokens, C=channels, W=width))
    yield Case("CausalConv1dStep", dict(B=1, T=5, C=24, W=4), {"activation": "none"})
    for start, (batch, tokens, channels, width) in zip(
        (0, 1, 3, 13, 34), ((1, 1, 33, 4), (3, 1, 16, 2), (1, 2, 40, 3), (2, 3, 17, 4), (3, 7, 96, 4)), strict=True
    ):
        yield Case("CausalConv1dStep", dict(B=batch, T=tokens, C=channels, W=width), {"x_start": start})


def _scan_cases():
    shapes = _sizes(
        "B T H P N",
        *[(1, 1, 1, 1, 1), (1, 1, 4, 64, 128), (1, 1, 3, 32, 16), (2, 1, 4, 24, 17), (1, 1, 2, 7, 5)],
        *[(3, 2, 2, 16, 8), (1, 7, 4, 64, 33), (2, 19, 4, 33, 16), (1, 64, 2, 32, 64)],
    )
    for state in ("float32", "float16", "int8"):
        for sizes in shapes:
            yield Case("SelectiveScanStep", {**sizes, "state": state})
        yield Case("SelectiveScanStep", {**shapes[6], "state": state}, {"ngroups": 2})
        yield Case("SelectiveScanStep", {**shapes[1], "state": state}, {"ngroups": 4})
        limits = {"dt_min": 0.001, "dt_max": 0.1}
        yield Case("SelectiveScanStep", {**shapes[7], "state": state}, limits)
        starts = {"x_start": 5, "dt_start": 1, "B_start": 0, "C_start": 35}
        for sizes in (shapes[1], shapes[3], shapes[4], shapes[7]):
            yield Case("SelectiveScanStep", {**sizes, "state": state}, starts)
        yield Case("SelectiveScanStep", {**shapes[6], "state": state}, {"ngroups": 2, "x_start": 3, "B_start": 18})
        yield Case("SelectiveScanStep", {**shapes[5], "state": state}, {"dt_start": 7, "C_start": 1})
    yield Case("SelectiveScanStep", shapes[6], kind="extreme")


def _norm_cases():
    shapes = _sizes("B T C", (1, 1, 1), (1, 1, 64), (1, 1, 100), (3, 1, 33), (2, 7, 48), (1, 3, 1024))
    for sizes in shapes:
        yield Case("RMSNorm", sizes)
        yield Case("GatedRMSNorm", sizes)
    yield Case("RMSNorm", shapes[4], {"eps": 1e-3}, "zero")
    yield Case("GatedRMSNorm", shapes[4], {"groups": 4, "eps": 1e-6})
    yield Case("GatedRMSNorm", shapes[2], {"groups": 2})
    yield Case("GatedRMSNorm", shapes[5], kind="saturated")
    for start, sizes in zip((3, 0, 17, 2, 5), (shapes[0], *shapes[2:]), strict=True):
        yield Case("GatedRMSNorm", sizes, {"z_start": start})
    yield Case("GatedRMSNorm", shapes[4], {"groups": 4, "z_start": 9})


CASES: list[Case] = [
    *_scaffold_cases(),
    *_int8_cases(),
    *_conv_cases(),
    *_scan_cases(),
    *_norm_cases(),
]
"""Every case of every op."""


def cases(op: str) -> list[Case]:
    """The cases of one op."""
    return [case for case in CASES if case.op == op]
