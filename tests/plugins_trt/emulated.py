"""The CUDA kernels of plugins/trt on the host emulation (tests/tools/cuda_emulation/emulation.h): built, and called
with NumPy arrays by op name, so that a test can put them beside opset's references.
"""

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins/trt"
EMULATION = ROOT / "tests/tools/cuda_emulation"
BUILD = ROOT / "build/emulated"

COMMON = f"-std=c++17 -g -Wall -Wextra -fPIC -DDFSSM_EMULATION -I{PLUGINS} -I{EMULATION}".split()
# Device code: every load and store reported (to its access.cpp, not to libtsan), a 16-byte access left whole,
# one rounding an operation as written.
DEVICE = (
    "-O1 -x c++ -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-sra -fno-strict-aliasing "
    "-ffp-contract=off -Wno-unknown-pragmas"
).split()
HOST = ["-O2"]


def compiler() -> str | None:
    return shutil.which("g++")


def _compile(source: Path) -> Path:
    """The object of one source, kept until the source, a header it may include or a flag changes."""
    flags = [*COMMON, *(DEVICE if source.suffix == ".cu" else HOST)]
    headers = {h for folder in (EMULATION, *PLUGINS.iterdir()) for h in folder.glob("*.*h")}
    key = hashlib.sha256(repr(flags).encode())
    for path in [source, *sorted(headers)]:
        key.update(path.read_bytes())
    stem = f"{source.parent.name}-{source.stem}"
    out = BUILD / f"{stem}-{key.hexdigest()[:16]}.o"
    if not out.exists():
        for stale in BUILD.glob(f"{stem}-*.o"):
            stale.unlink()
        part = out.with_suffix(".part")
        done = subprocess.run([compiler(), *flags, "-c", str(source), "-o", str(part)], capture_output=True, text=True)
        assert not done.returncode, f"{source.name} does not compile for the emulation:\n{done.stderr}"
        part.rename(out)
    return out


def build(name: str, sources: list[Path], api: bool = True) -> Path:
    """A library of these sources and the emulation, in build/; safe beside another process that does the same. `api`:
    with the C functions of all kernels."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        machinery = sorted(path for path in EMULATION.glob("*.cpp") if api or path.stem != "capi")
        objects = list(pool.map(_compile, [*sources, *machinery]))
        key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
        library = BUILD / f"lib{name}-{key}.so"
        if not library.exists():
            for stale in BUILD.glob(f"lib{name}-*.so"):
                stale.unlink()
            link = [compiler(), "-shared", "-Wl,--no-undefined", "-o", str(library), *map(str, objects)]
            done = subprocess.run(link, capture_output=True, text=True)
            assert not done.returncode, f"{name} does not link:\n{done.stderr}"
        return library


class EmulationError(Exception):
    """A kernel did something it must not, or its launch was refused; `code` is the cudaError_t."""

    def __init__(self, code: int, report: str):
        super().__init__(f"cudaError {code}: {report}")
        self.code, self.report = code, report


CONSTANT, WRITTEN, UNINITIALISED = range(3)
PADDING = 4096


class Emulation:
    """A loaded library with its memory: `put` arrays, `call` functions, all buffers are forgotten after each call."""

    def __init__(self, path: Path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.dfssm_trt_last_error.restype = ctypes.c_char_p
        self.buffers: list[tuple[str, np.ndarray, int, int]] = []

    def put(self, name: str, array: np.ndarray, contents: int = CONSTANT, offset: int = 0) -> np.ndarray:
        """A copy of `array` for the next call, `offset` bytes past an aligned address, in the midst of 0xff bytes: NaN
        to who reads them as fp32 or fp16."""
        memory = np.full(array.nbytes + 2 * PADDING, 255, np.uint8)
        start = PADDING - (memory.ctypes.data + PADDING) % 256 + offset
        inside = memory[start : start + array.nbytes]
        if contents != UNINITIALISED:
            inside[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.library.dfssm_trt_add_buffer(
            name.encode(), ctypes.c_void_p(inside.ctypes.data), ctypes.c_size_t(array.nbytes), contents
        )
        self.buffers.append((name, memory, start, array.nbytes))
        return inside.view(array.dtype).reshape(array.shape)

    def new(self, name: str, shape, dtype=np.float32, offset: int = 0) -> np.ndarray:
        """Room for an output: reading it before it was written is an error."""
        return self.put(name, np.broadcast_to(np.zeros((), dtype), shape), UNINITIALISED, offset)

    def call(self, function: str, *arguments) -> None:
        """Arrays go as pointers, None as null, int as int32 (pass c_int64 or c_float where it is one)."""
        try:
            code = getattr(self.library, function)(*map(_argument, arguments))
            report = self.library.dfssm_trt_last_error().decode()
            if code:
                raise EmulationError(code, self._with_source(report))
            for name, memory, start, size in self.buffers:
                outside = np.concatenate([memory[:start], memory[start + size :]])
                assert (outside == 255).all(), f"{function} wrote outside {name}"
        finally:
            self.forget()

    def launches(self) -> int:
        """Kernels launched since the last call."""
        return self.library.dfssm_trt_launches()

    def forget(self) -> None:
        self.library.dfssm_trt_clear_buffers()
        self.buffers.clear()

    def _with_source(self, report: str) -> str:
        """The source line instead of the code address."""

        def line(match: re.Match) -> str:
            command = ["addr2line", "-Csie", str(self.path), match[1]]
            return "[" + subprocess.run(command, capture_output=True, text=True).stdout.replace("\n", " ").strip() + "]"

        return re.sub(r"\[code (0x[0-9a-f]+)\]", line, report) if shutil.which("addr2line") else report


def _argument(value):
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(None) if value is None else value


# Activations: fp32 on the outside; what the kernel reads and writes may be narrower.


def widen(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


TYPES = {"float32": 0, "float16": 1}
STATES = {"float32": 0, "float16": 1, "int8": 2}


class Kernels(Emulation):
    """The kernels by op name: `kernels.run(op, inputs, **attributes)`, as opset.reference.REFERENCES."""

    def run(
        self,
        op: str,
        inputs: dict[str, np.ndarray],
        *,
        type: str = "float32",
        in_place: bool = False,
        columns: dict[str, tuple[int, int]] | None = None,
        offset: int = 0,
        dependent: bool = False,
        **attributes,
    ) -> tuple[np.ndarray, ...]:
        """Outputs of one op, always a tuple, activations widened to fp32. `type` is what activations are stored as;
        `in_place`: states (of the norms: y) are overwritten; `columns`: name -> (start, width), that input is a range
        of columns of a tensor that wide, NaN elsewhere; `offset`: bytes by which activations miss a 256-byte boundary;
        `dependent`: the launch may begin before that has ended which makes activations and states.
        """
        self.type, self.in_place, self.offset, self.dependent = type, in_place, offset, dependent
        self.library.dfssm_trt_dependent_launches(int(dependent))
        inputs = dict(inputs)
        for name, (start, width) in (columns or {}).items():
            x = inputs[name]
            edges = [(0, 0)] * (x.ndim - 1) + [(start, width - start - x.shape[-1])]
            inputs[name] = np.pad(x, edges, constant_values=np.nan)
            attributes[f"{name}_start"] = start
        try:
            return _RUN[op](self, **inputs, **attributes)
        finally:
            self.forget()

    def activation(self, name: str, x: np.ndarray, contents: int = CONSTANT) -> np.ndarray:
        return self.put(name, x.astype(self.type), WRITTEN if self.dependent else contents, self.offset)

    def columns(self, name: str, x: np.ndarray, start: int, width: int) -> tuple[np.ndarray, ctypes.c_int64]:
        """The columns [start, start + width) of x (all for start = -1), and the stride from token to token. The buffer
        ends with the last column of the last token.
        """
        x, start = x.astype(self.type), max(start, 0)
        assert start + width <= x.shape[-1]
        used = x.reshape(-1)[start : x.size - (x.shape[-1] - start - width)]
        contents = WRITTEN if self.dependent else CONSTANT
        return self.put(name, used, contents, self.offset + start * x.itemsize), ctypes.c_int64(x.shape[-1])

    def state(self, name: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The array read and the array written."""
        if self.in_place:
            both = self.put(name, state, WRITTEN)
            return both, both
        old = self.put(name, state, WRITTEN if self.dependent else CONSTANT)
        return old, self.new(f"new_{name}", state.shape, state.dtype)

    def output(self, name: str, shape) -> np.ndarray:
        return self.new(name, shape, self.type, self.offset)

    def workspace(self, bytes: int) -> np.ndarray:
        return self.new("workspace", bytes, np.uint8)

    def sized(self, function: str, *arguments) -> int:
        size = getattr(self.library, function)
        size.restype = ctypes.c_size_t
        return size(*arguments)


def _weights(k: Kernels, bits, scale, down, down_scale, up, up_scale) -> list[np.ndarray]:
    """Those of a scaffold, in the order in which every function takes them."""
    weights = dict(scale=scale, down=down, down_scale=down_scale, up=up, up_scale=up_scale)
    return [k.put("bits", bits.view(np.uint32)), *(k.put(name, value) for name, value in weights.items())]


def _scaffold(k: Kernels, x, planes=1, layout=0, **weights):
    assert layout == 0, "the kernels read the canonical layout"
    n, K, M, R = x.size // x.shape[-1], x.shape[-1], weights["up_scale"].size, weights["down"].shape[0]
    y = k.output("y", (*x.shape[:-1], M))
    tensors = [k.activation("x", x), *_weights(k, **weights)]
    workspace = k.workspace(k.sized("dfssm_trt_scaffold_workspace", n, K, M, R))
    k.call("dfssm_trt_binary_scaffold_matmul", *tensors, y, n, K, M, R, planes, TYPES[k.type], workspace)
    return (widen(y),)


def _norm_scaffold_conv(
    k: Kernels, x, norm_weight, state, conv_weight, conv_bias,
    eps=1e-5, planes=1, layout=0, activation="silu", x_start=0, **weights,
):  # fmt: skip
    (B, T, K), (C, W) = x.shape, conv_weight.shape
    M, R = weights["up_scale"].size, weights["down"].shape[0]
    y = k.output("y", (B, T, M))
    old, new = k.state("state", state)
    tensors = [k.activation("x", x), k.put("norm_weight", norm_weight), *_weights(k, **weights), old]
    tensors += [k.put("conv_weight", conv_weight), k.put("conv_bias", conv_bias), y, new]
    sizes = [B, T, K, M, R, planes, C, W]
    workspace = k.workspace(k.sized("dfssm_trt_scaffold_workspace", B * T, K, M, R))
    attributes = [ctypes.c_float(eps), int(activation == "silu"), x_start]
    k.call("dfssm_trt_norm_scaffold_conv", *tensors, *sizes, *attributes, TYPES[k.type], workspace)
    return widen(y), new


def _gated_norm_scaffold_add(
    k: Kernels, y, z, norm_weight, residual, eps=1e-5, groups=1, planes=1, layout=0, z_start=-1, **weights
):
    n, K, M, R = y.size // y.shape[-1], y.shape[-1], weights["up_scale"].size, weights["down"].shape[0]
    out = k.output("out", (*y.shape[:-1], M))
    gate, stride = k.columns("z", z, z_start, K)
    tensors = [k.activation("y", y), gate, k.put("norm_weight", norm_weight), *_weights(k, **weights)]
    tensors += [k.activation("residual", residual), out]
    workspace = k.workspace(k.sized("dfssm_trt_scaffold_workspace", n, K, M, R))
    sizes = [n, K, M, R, planes, groups, stride, ctypes.c_float(eps)]
    k.call("dfssm_trt_gated_norm_scaffold_add", *tensors, *sizes, TYPES[k.type], workspace)
    return (widen(out),)


def _int8(k: Kernels, x, w, w_scale, y_type="float32"):
    n, K, M = x.size // x.shape[-1], x.shape[-1], w.shape[0]
    y = k.new("y", (*x.shape[:-1], M), y_type, 2 * k.offset)  # fp32 may be beside x of 2 bytes
    tensors = k.activation("x", x), k.put("w", w), k.put("w_scale", w_scale), y
    workspace = k.workspace(k.sized("dfssm_trt_int8_workspace", n, K))
    k.call("dfssm_trt_int8_matmul", *tensors, n, K, M, TYPES[k.type], TYPES[y_type], workspace)
    return (widen(y),)


def _conv(k: Kernels, x, state, weight, bias, activation="silu", x_start=-1):
    (B, T), (C, W) = x.shape[:2], weight.shape
    y = k.output("y", (B, T, C))
    x, stride = k.columns("x", x, x_start, C)
    old, new = k.state("state", state)
    tensors = x, old, k.put("weight", weight), k.put("bias", bias), y, new
    k.call("dfssm_trt_causal_conv1d_step", *tensors, B, T, C, W, stride, int(activation == "silu"), TYPES[k.type])
    return widen(y), new


def _scan(
    k: Kernels, x, dt, B, C, A_log, D, dt_bias, state, state_scale=None,
    ngroups=1, dt_min=0.0, dt_max=np.inf, x_start=-1, dt_start=-1, B_start=-1, C_start=-1,
):  # fmt: skip
    batch, H, N, P = state.shape
    T = x.shape[1]
    y = k.output("y", (batch, T, H * P))
    ranges = [
        k.columns("x", x, x_start, H * P),
        k.columns("dt", dt, dt_start, H),
        k.columns("B", B, B_start, ngroups * N),
        k.columns("C", C, C_start, ngroups * N),
    ]
    tensors = [tensor for tensor, _ in ranges] + [k.put("A_log", A_log), k.put("D", D), k.put("dt_bias", dt_bias)]
    old, new = k.state("state", state)
    old_scale, new_scale = k.state("state_scale", state_scale) if state_scale is not None else (None, None)
    tensors += [old, old_scale, y, new, new_scale]
    strides, limits = [stride for _, stride in ranges], [ctypes.c_float(dt_min), ctypes.c_float(dt_max)]
    sizes = [batch, T, H, P, N, ngroups]
    call = [*tensors, *sizes, *strides, *limits, STATES[str(state.dtype)], TYPES[k.type]]
    size = ctypes.c_size_t()
    code = k.library.dfssm_trt_selective_scan_step(*map(_argument, call), None, ctypes.byref(size))
    assert code == 0
    k.call("dfssm_trt_selective_scan_step", *call, k.workspace(max(size.value, 1)), None)
    return (widen(y), new) if new_scale is None else (widen(y), new, new_scale)


def _gated_norm(k: Kernels, y, z, weight, eps=1e-5, groups=1, z_start=-1):
    n, C = y.size // y.shape[-1], y.shape[-1]
    tensor = k.activation("y", y, WRITTEN if k.in_place else CONSTANT)
    out = tensor if k.in_place else k.output("out", y.shape)
    gate, stride = (None, ctypes.c_int64(0)) if z is None else k.columns("z", z, z_start, C)
    tensors = tensor, gate, k.put("weight", weight), out
    k.call("dfssm_trt_rms_norm", *tensors, n, C, groups, stride, ctypes.c_float(eps), TYPES[k.type])
    return (widen(out),)


def _norm(k: Kernels, x, weight, eps=1e-5):
    return _gated_norm(k, x, None, weight, eps)


_RUN = {
    "BinaryScaffoldMatMul": _scaffold,
    "Int8MatMul": _int8,
    "CausalConv1dStep": _conv,
    "SelectiveScanStep": _scan,
    "GatedRMSNorm": _gated_norm,
    "RMSNorm": _norm,
    "NormScaffoldConv": _norm_scaffold_conv,
    "GatedNormScaffoldAdd": _gated_norm_scaffold_add,
}


def load() -> Kernels:
    """Every kernel there is."""
    return Kernels(build("dfssm_trt_emulated", sorted(PLUGINS.glob("*/kernel.cu"))))
