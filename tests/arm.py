"""The kernels for Arm on a machine that is none: cross-compiled into build/arm, and run under qemu-aarch64.

Python and ONNX Runtime do not run there: tools/arm/run_calls.cpp does the calls. `native(isa)` has the functions of
dfssm._native, so that the tests of the kernels run over it.
"""

import fcntl
import functools
import math
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
    """run_calls in a process: an op is a method as of dfssm._native, with the same arguments."""

    def __init__(self, cpu: str):
        self.cpu = cpu
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            command(self.cpu, "run_calls"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._results = Results(self._process.stdout)

    def isas(self) -> list[str]:
        return self._results.isas

    def __getattr__(self, op: str):
        return functools.partial(self._call, op)

    def _call(self, op: str, isa: str, *positional, in_place: bool = False, **named):
        call, arrays = encoded(op, isa, *positional, in_place=in_place, **named)
        try:
            self._process.stdin.write(call)
            self._process.stdin.flush()
            outputs = self._results.read()
        except (EOFError, BrokenPipeError):
            why = self._process.stderr.read().decode().strip()
            self._start()
            raise AssertionError(f"{op} on {isa} under {QEMU} -cpu {self.cpu} died: {why}") from None
        return self._as_native(op, arrays, in_place, outputs)

    def _as_native(self, op: str, arrays: dict, in_place: bool, outputs: list[np.ndarray]):
        """y lacks the leading dimensions that x lacks; what is written in place goes into the caller's arrays."""
        if op not in ALL_OPS:
            return tuple(outputs)
        first = arrays[ALL_OPS[op].inputs[0].name]
        y = outputs[0].reshape(*first.shape[:-1], -1)
        updated = [t.over for t in ALL_OPS[op].outputs[1 : len(outputs)]]
        homes = [arrays.get("out"), *(arrays[name] if in_place else None for name in updated)]
        placed = []
        for home, value in zip(homes, [y, *outputs[1:]], strict=True):
            if home is not None:
                home[...] = value
            placed.append(value if home is None else home)
        return placed[0] if len(placed) == 1 else tuple(placed)


def encoded(op: str, isa: str, *positional, threads: int = 1, in_place: bool = False, out=None, **named):
    """A call as run_calls.cpp describes it, and its arrays by name; the arguments are those of dfssm._native."""
    inputs, attributes = ["x"], []
    if op in ALL_OPS:
        inputs, attributes = [t.name for t in ALL_OPS[op].inputs], [a.name for a in ALL_OPS[op].attributes]
    given = dict(zip([*inputs, *attributes], positional, strict=False)) | named
    arrays = {name: value for name, value in given.items() if name in inputs and value is not None}
    if out is not None:
        arrays["out"] = out
    call = [_text(op), _text(isa), struct.pack("=qq", threads, in_place), _count(given.keys() - arrays)]
    for name in given.keys() - arrays:
        value = given[name]
        text = isinstance(value, str)
        call += [_text(name), struct.pack("=d", 0 if text else value), _text(value if text else "")]
    call.append(_count(arrays))
    for name, array in arrays.items():
        place = struct.pack("=Q", array.ctypes.data % PAGE)  # as here, so does the copy lie in a page
        shape = struct.pack(f"=Q{array.ndim}q", array.ndim, *array.shape)
        call += [_text(name), _text(array.dtype.name), shape, place, np.ascontiguousarray(array).tobytes()]
    return b"".join(call), arrays


class Results:
    """What run_calls writes: `isas`, the kernel tables of its CPU, then the results of one call after another."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.isas = self._text().split()

    def read(self) -> list[np.ndarray]:
        """The outputs of the next call. ValueError with its message where it was refused, EOFError where none is."""
        error, count = self._text(), self._number()
        if error:
            raise ValueError(error)
        return [self._array() for _ in range(count)]

    def _bytes(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _number(self) -> int:
        return struct.unpack("=Q", self._bytes(8))[0]

    def _text(self) -> str:
        return self._bytes(self._number()).decode()

    def _array(self) -> np.ndarray:
        _, dtype, rank = self._text(), np.dtype(self._text()), self._number()
        shape = struct.unpack(f"={rank}q", self._bytes(8 * rank))
        self._number()
        return np.frombuffer(bytearray(self._bytes(math.prod(shape) * dtype.itemsize)), dtype).reshape(shape)


def _text(value: str) -> bytes:
    return struct.pack("=Q", len(value.encode())) + value.encode()


def _count(of) -> bytes:
    return struct.pack("=Q", len(of))
