"""The little of the CUDA runtime that a step needs, through NVIDIA's `cuda-bindings`: memory, one stream, graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.extras import require
from dfssm.targets.cuda import PACKAGES

MOST_LARGEST = 1024
"""Of `largest`: kMostLargest of plugins/trt/common/kernels.h."""

DEVICE = 0
"""The one that `targets/cuda.py` lists first; CUDA_VISIBLE_DEVICES chooses others."""


class Cuda:
    """One stream of DEVICE. All work is queued, in `with cuda.device()`; `synchronize` waits for it. Addresses are
    ints. `plugins`: the plugin library, which has `largest`.

    Raises DfssmError when `cuda-bindings` is missing, there is no driver or no device, or a call fails.
    """

    def __init__(self, plugins: Path | None = None) -> None:
        require(PACKAGES)
        from cuda.bindings import runtime

        self._runtime = runtime
        if not self._call("cudaGetDeviceCount"):
            raise DfssmError("there is no CUDA device: run this bundle on a machine with an NVIDIA GPU")
        # One that waits for the default stream would break, while it records, what others (PyTorch) queue there.
        with self.device():
            self.stream = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        self.recording = False
        self._plugins = ctypes.CDLL(str(plugins)) if plugins else None
        self.most_largest = MOST_LARGEST if plugins else 0
        self.weighs = hasattr(self._plugins, "dfssm_total_weight")  # the libraries of earlier bundles do not

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            with suppress(DfssmError):  # CUDA may have gone before, when the program ends
                self._call("cudaStreamDestroy", self.stream)

    @contextmanager
    def device(self) -> Iterator[None]:
        """In a `with` block, DEVICE is this thread's, whatever the program has chosen (torch.cuda.set_device)."""
        before = self._call("cudaGetDevice")
        if before == DEVICE:
            yield
            return
        self._call("cudaSetDevice", DEVICE)
        try:
            yield
        finally:
            self._call("cudaSetDevice", before)

    def allocate(self, size: int) -> int:
        """`size` bytes of device memory, zeroed."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self.zero(address, size)
        return address

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, size: int) -> np.ndarray:
        """u8[size], memory of the host that copies need not wait for, and that may be recorded."""
        address = int(self._call("cudaHostAlloc", max(size, 1), 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def unpin(self, array: np.ndarray) -> None:
        """Give back what `pinned` returned; nothing may use it any more."""
        self._call("cudaFreeHost", array.ctypes.data)

    def zero(self, address: int, size: int) -> None:
        """Queue setting `size` bytes of device memory to 0."""
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Queue a copy of a contiguous array; it must stay as it is until `synchronize`."""
        self._copy(address, array.ctypes.data, array.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Queue a copy into a contiguous array."""
        self._copy(array.ctypes.data, address, array.nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue a copy from device memory to device memory."""
        self._copy(to, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def largest(self, logits: int, rows: int, vocab: int, count: int, tokens: int, values: int) -> None:
        """Queue `sampling.largest` of logits f32[rows,vocab], for a `count` of up to `most_largest`: tokens
        i64[rows,count] and values f32[rows,count].
        """
        self._queue("dfssm_largest", (logits, tokens, values), (rows, vocab, count))

    def total_weight(self, logits: int, rows: int, vocab: int, divisors: int, totals: int) -> None:
        """Queue `sampling.total_weight` of logits f32[rows,vocab], with `sampling.divisor` of the temperatures,
        f32[rows]: totals i64[rows].
        """
        self._queue("dfssm_total_weight", (logits, divisors, totals), (rows, vocab))

    def _queue(self, function: str, addresses: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        where = (ctypes.c_void_p(address) for address in (*addresses, self.stream))
        error = getattr(self._plugins, function)(*where, *(ctypes.c_int32(size) for size in sizes))
        self._check(function, self._runtime.cudaError_t(error))

    def synchronize(self) -> None:
        """Wait for what was queued. A recording that was cut short is given up: nothing else would run before."""
        if self.recording:
            with suppress(DfssmError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self.stream))
            self.recording = False
        self._call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """What is queued from here on is recorded, not run."""
        self.recording = True
        # Relaxed: a state that Python collects meanwhile may give its memory back.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """The recording, ready for `launch`."""
        graph = self._call("cudaStreamEndCapture", self.stream)
        self.recording = False
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return executable

    def launch(self, executable: Any) -> None:
        self._call("cudaGraphLaunch", executable, self.stream)

    def release(self, executable: Any) -> None:
        self._call("cudaGraphExecDestroy", executable)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", to, source, size, kind, self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *result = getattr(self._runtime, name)(*arguments)
        self._check(name, error)
        return result[0] if result else None

    def _check(self, name: str, error: Any) -> None:
        if error != self._runtime.cudaError_t.cudaSuccess:
            reason = error.name.removeprefix("cudaError")
            raise DfssmError(f"CUDA says {reason} ({name}): {_REMEDIES.get(reason, 'look at nvidia-smi')}")


_REMEDIES = {
    "InsufficientDriver": "install an NVIDIA driver for CUDA 13, or run on a machine with an NVIDIA GPU",
    "NoDevice": "run this bundle on a machine with an NVIDIA GPU",
    "MemoryAllocation": "the device is out of memory; use a smaller batch",
    "InitializationError": "a process forked from one that used CUDA cannot: let multiprocessing use 'spawn'",
}
