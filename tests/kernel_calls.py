"""Calling the kernels of dfssm._native by op name, and arrays in awkward places."""

import ctypes
import mmap

import numpy as np
import pytest

from dfssm import _native

F32 = np.float32
PROT_NONE = 0  # <sys/mman.h>; the module mmap lacks it

ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in _native.isas(), reason=f"this CPU cannot run {isa} kernels"))
    for isa in ("scalar", "avx2", "avx512vnni")
]
each_isa = pytest.mark.parametrize("isa", ISAS)

_FUNCTIONS = {
    "BinaryScaffoldMatMul": _native.binary_scaffold_matmul,
    "Int8MatMul": _native.int8_matmul,
    "CausalConv1dStep": _native.causal_conv1d_step,
    "SelectiveScanStep": _native.selective_scan_step,
    "GatedRMSNorm": _native.gated_rms_norm,
    "RMSNorm": _native.rms_norm,
}
OUTPUTS = ("y", "new_state", "new_state_scale")


def run(op: str, isa: str, inputs: dict, **options) -> tuple[np.ndarray, ...]:
    """Outputs of one op, always a tuple; `options` are attributes, threads, in_place, out."""
    outputs = _FUNCTIONS[op](isa, **inputs, **options)
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
