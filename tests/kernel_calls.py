"""Calling the kernels of dfssm._native by op name, and arrays in awkward places.

Where the CPU lacks AVX-512 VNNI, AVX-512 VBMI or AVX-VNNI those kernels are simulated (simulated_avx512.py). Those for
Arm run in an emulator (arm.py) where the machine is none.
"""

import ctypes
import mmap
import platform
from pathlib import Path

import arm
import numpy as np
import pytest
import simulated_avx512

from dfssm import _native

F32 = np.float32
PROT_NONE = 0  # <sys/mman.h>; the module mmap lacks it


KERNELS = Path(__file__).parents[1] / "plugins/ort_cpu/kernels"
KNOWN = ["scalar", *sorted(path.stem.removeprefix("matmul__") for path in KERNELS.glob("matmul__*.cpp"))]
"""The tables there are sources of."""


def isas_to_test(usable: list[str], simulate: str) -> list[str]:
    """Of a CPU that can use these. `simulate`: one that is simulated although it is usable."""
    simulated = {isa: name for isa, name in simulated_avx512.NAMES.items() if isa not in usable or isa == simulate}
    return [isa for isa in KNOWN if isa in usable or isa not in simulated] + list(simulated.values())


def native(isa: str):
    """What has the kernels of that instruction set, real, simulated or emulated: its functions take `isa` first."""
    if isa in EMULATED:
        return arm.native(isa)
    return simulated_avx512.native() if isa in simulated_avx512.NAMES.values() else _native


EMULATED = [] if platform.machine() == "aarch64" else list(arm.CPUS)


ISAS = [
    pytest.param(
        isa,
        marks=pytest.mark.skipif(
            isa not in [*_native.isas(), *simulated_avx512.NAMES.values(), *EMULATED],
            reason=f"this CPU cannot run {isa} kernels",
        ),
    )
    for isa in isas_to_test(_native.isas(), simulated_avx512.forced())
]
each_isa = pytest.mark.parametrize("isa", ISAS)

OUTPUTS = ("y", "new_state", "new_state_scale")


def run(op: str, isa: str, inputs: dict, **options) -> tuple[np.ndarray, ...]:
    """Outputs of one op, always a tuple; `options` are attributes, threads, in_place, out."""
    outputs = getattr(native(isa), op)(isa, **inputs, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def copies(inputs: dict) -> dict:
    return {name: value.copy() for name, value in inputs.items()}


def guarded(a: np.ndarray, at: str) -> np.ndarray:
    """A copy of `a` that starts (`at`="start") or ends ("end") right beside a page that cannot be touched:
    the smallest read or write outside the array on that side is a segmentation fault.
    """
    page = mmap.PAGESIZE
    pages = -(-max(a.nbytes, 1) // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + (pages + 1) * page):
        if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if at == "start" else (pages + 1) * page - a.nbytes
    out = np.frombuffer(memory, a.dtype, a.size, offset).reshape(a.shape)
    out[...] = a
    return out


def misaligned(a: np.ndarray) -> np.ndarray:
    """A copy of `a` one byte past an aligned address."""
    out = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype) if a.nbytes else a
    out = out.reshape(a.shape)
    out[...] = a
    return out
