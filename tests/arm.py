"""The kernels for Arm on a machine that is none: cross-compiled into build/arm, and run under qemu-aarch64.

Python and ONNX Runtime do not run there: tools/arm/run_calls.cpp does the calls. `native(isa)` has the functions of
dfssm._native, so that the tests of the kernels run over it.
"""

import fcntl
import functools
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from nodes import ALL_OPS

CPUS = {"dotprod": "neoverse-n1", "i8mm": "max"}
"""Kernel tables, each with a CPU of qemu for which it is the best: what that one lacks, the table does without."""

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/arm"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", QEMU: "qemu-user"}
PAGE = 4096


class Unavailable(Exception):
    """What this machine lacks."""


def native(isa: str) -> "Runner":
    """The runner whose CPU has `isa` as its best; skips the test, with the reason, where there can be none."""
    outcome = _runner(isa)
    if isinstance(outcome, Unavailable):
        pytest.skip(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@functools.cache
def _runner(isa: str) -> "Runner | Exception":
    try:
        build()
    except (Unavailable, AssertionError) as error:
        return error
    return Runner(CPUS[isa])


@functools.cache
def build() -> None:
    """BUILD is up to date; safe beside another process that does the same."""
    if missing := [package for command, package in PACKAGES.items() if not shutil.which(command)]:
        raise Unavailable(f"the kernels for Arm are not run: apt-get install {' '.join(missing)}")
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent))
    if not cmake:
        raise Unavailable("the kernels for Arm are not built: cmake is not installed")
    definitions = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake/aarch64.cmake",
        "CMAKE_CXX_FLAGS": "",  # not those of CXXFLAGS, which are for the CPU here
        "Python_EXECUTABLE": sys.executable,
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", ROOT / "tests/tools/arm", "-B", BUILD, *(f"-D{k}={v}" for k, v in definitions.items())],
            [cmake, "--build", BUILD, "-j2"],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert not done.returncode, f"the kernels for Arm do not build:\n{done.stdout}"


def command(cpu: str, program: str, *arguments: str | Path) -> list[str | Path]:
    """Runs `program` of the build on a CPU that qemu knows. The C library is that of the cross compiler."""
    return [QEMU, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", BUILD / program, *arguments]


class Runner:
    """run_calls in a process: an op is a method as of dfssm._native, with the same arguments. The format of a call is
    described there.
    """

    def __init__(self, cpu: str):
        self.cpu, self._process = cpu, None
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            command(self.cpu, "run_calls"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._isas = self._read_text().split()

    def isas(self) -> list[str]:
        return self._isas

    def __getattr__(self, op: str):
        return functools.partial(self._call, op)

    def _call(self, op: str, isa: str, *positional, threads: int = 1, in_place: bool = False, out=None, **named):
        if op in ALL_OPS:
            inputs, attributes = [t.name for t in ALL_OPS[op].inputs], [a.name for a in ALL_OPS[op].attributes]
        else:
            inputs, attributes = ["x"], []
        given = dict(zip([*inputs, *attributes], positional, strict=False)) | named
        arrays = {name: value for name, value in given.items() if name in inputs and value is not None}
        if out is not None:
            arrays["out"] = out
        try:
            call = [_text(op), _text(isa), struct.pack("=qq", threads, in_place), _count(given.keys() - arrays)]
            for name in given.keys() - arrays:
                value = given[name]
                text = isinstance(value, str)
                call += [_text(name), struct.pack("=d", 0 if text else value), _text(value if text else "")]
            call.append(_count(arrays))
            for name, array in arrays.items():
                call += [_text(name), *_described(array), np.ascontiguousarray(array).tobytes()]
            self._process.stdin.write(b"".join(call))
            self._process.stdin.flush()
            error = self._read_text()
            outputs = [self._read_array() for _ in range(self._read("Q"))]
        except (EOFError, BrokenPipeError):
            why = self._process.stderr.read().decode().strip()
            self._start()
            raise AssertionError(f"{op} on {isa} under {QEMU} -cpu {self.cpu} died: {why}") from None
        if error:
            raise ValueError(error)
        return self._as_native(op, arrays, in_place, outputs)

    def _as_native(self, op: str, arrays: dict, in_place: bool, outputs: list[np.ndarray]):
        """y lacks the leading dimensions that x lacks; what is written in place goes into the caller's arrays."""
        if op not in ALL_OPS:
            return tuple(outputs)
        first = arrays[ALL_OPS[op].inputs[0].name]
        y = outputs[0].reshape(*first.shape[:-1], -1)
        homes = [arrays.get("out")] + [
            arrays[t.over] if in_place else None for t in ALL_OPS[op].outputs[1 : len(outputs)]
        ]
        placed = []
        for home, value in zip(homes, [y, *outputs[1:]], strict=True):
            if home is not None:
                home[...] = value
            placed.append(value if home is None else home)
        return placed[0] if len(placed) == 1 else tuple(placed)

    def _read(self, kind: str):
        data = _exactly(self._process.stdout, struct.calcsize(f"={kind}"))
        values = struct.unpack(f"={kind}", data)
        return values[0] if len(values) == 1 else values

    def _read_text(self) -> str:
        return _exactly(self._process.stdout, self._read("Q")).decode()

    def _read_array(self) -> np.ndarray:
        _, dtype, rank = self._read_text(), np.dtype(self._read_text()), self._read("Q")
        shape = struct.unpack(f"={rank}q", _exactly(self._process.stdout, 8 * rank))
        self._read("Q")
        data = _exactly(self._process.stdout, int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(bytearray(data), dtype).reshape(shape)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _text(value: str) -> bytes:
    return struct.pack("=Q", len(value.encode())) + value.encode()


def _count(of) -> bytes:
    return struct.pack("=Q", len(of))


def _described(array: np.ndarray) -> tuple[bytes, bytes]:
    """dtype, shape, and the place in a page, which the copy has, too."""
    shape = struct.pack(f"=Q{array.ndim}q", array.ndim, *array.shape)
    return _text(array.dtype.name), shape + struct.pack("=Q", array.ctypes.data % PAGE)
