"""The plugins of a libdfssm_trt.so without TensorRT: driver.cpp by ctypes, on torch's tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

MAX_RANK, MAX_OUTPUTS = 8, 4
ALIGNMENT = 256

# nvinfer1::DataType
TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3}
_DTYPES = {number: dtype for dtype, number in TYPES.items()}


class Library:
    """An opened plugin library. `device` is where its kernels run: "cpu" for one over the host emulation."""

    def __init__(self, driver: Path, library: Path):
        self.driver = ctypes.CDLL(str(driver))
        self.driver.harness_error.restype = c_char_p
        self.driver.harness_open.restype = self.driver.harness_create.restype = c_void_p
        self.handle = c_void_p(self.driver.harness_open(str(library).encode()))
        self.check(self.handle.value, str(library))
        self.device = "cpu" if self.driver.harness_is_emulated(self.handle) else "cuda"

    def check(self, done: object, who: str) -> None:
        if not done:
            raise RuntimeError(f"{who}: {self.driver.harness_error().decode()} failed; the reason is on stderr")

    def stream(self) -> c_void_p:
        """The stream that torch works on."""
        return c_void_p(torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None)

    def largest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Queue dfssm_largest of logits f32[rows,vocab]: tokens i64[rows,count], values f32[rows,count]."""
        rows, vocab = logits.shape
        found = self.empty((rows, count), torch.int64), self.empty((rows, count), torch.float32)
        where = (c_void_p(tensor.data_ptr()) for tensor in (logits, *found))
        code = self.driver.harness_largest(self.handle, *where, self.stream(), rows, vocab, count)
        self.check(code == 0, f"the {count} largest of {vocab}")
        return found

    def total_weight(self, logits: Tensor, divisors: Tensor) -> Tensor:
        """Queue dfssm_total_weight of logits f32[rows,vocab] by divisors f32[rows]: i64[rows]."""
        rows, vocab = logits.shape
        totals = self.empty((rows,), torch.int64)
        where = (c_void_p(tensor.data_ptr()) for tensor in (logits, divisors, totals))
        code = self.driver.harness_total_weight(self.handle, *where, self.stream(), rows, vocab)
        self.check(code == 0, f"the weight of {vocab}")
        return totals

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a tensor, aligned as device memory is."""
        size = torch.Size(shape).numel() * dtype.itemsize
        room = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.device)
        start = -room.data_ptr() % ALIGNMENT
        return room[start : start + size].view(dtype).reshape(shape)

    def put(self, value: Tensor) -> Tensor:
        """A copy of `value` on the device."""
        return self.empty(value.shape, value.dtype).copy_(value)


class Plugin:
    """One node for inputs of fixed shapes. `outputs` are the (dtype, shape) of what it makes, `workspace` its bytes."""

    def __init__(
        self,
        library: Library,
        op: str,
        name: str,
        attributes: Mapping[str, int | float | str],
        inputs: Sequence[Tensor],
    ):
        self._library, self._name = library, f"{op} {name}"
        values = [_field(value) for value in attributes.values()]
        count = len(values)
        self._node = c_void_p(
            library.driver.harness_create(
                library.handle,
                op.encode(),
                name.encode(),
                count,
                (c_char_p * count)(*(key.encode() for key in attributes)),
                (c_int32 * count)(*(kind for kind, _, _ in values)),
                (c_void_p * count)(*(ctypes.addressof(value) for _, value, _ in values)),
                (c_int32 * count)(*(length for _, _, length in values)),
            )
        )
        library.check(self._node.value, self._name)
        self._configure(inputs)

    def _configure(self, inputs: Sequence[Tensor]) -> None:
        count = len(inputs)
        dims = (c_int64 * (MAX_RANK * count))()
        for i, tensor in enumerate(inputs):
            dims[MAX_RANK * i : MAX_RANK * i + tensor.ndim] = list(tensor.shape)
        types, ranks = (c_int32 * MAX_OUTPUTS)(), (c_int32 * MAX_OUTPUTS)()
        made, workspace = (c_int64 * (MAX_RANK * MAX_OUTPUTS))(), c_int64()
        outputs = self._library.driver.harness_configure(
            self._node,
            count,
            (c_int32 * count)(*(TYPES[tensor.dtype] for tensor in inputs)),
            (c_int32 * count)(*(tensor.ndim for tensor in inputs)),
            dims,
            MAX_OUTPUTS,
            types,
            ranks,
            made,
            ctypes.byref(workspace),
        )
        self._library.check(outputs > 0, self._name)
        self.outputs = [
            (_DTYPES[types[i]], tuple(made[MAX_RANK * i : MAX_RANK * i + ranks[i]])) for i in range(outputs)
        ]
        self.workspace = workspace.value

    def enqueue(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Tensor) -> None:
        """Queue one launch. An output may be an input's memory where the op allows that."""
        code = self._library.driver.harness_enqueue(
            self._node,
            (c_void_p * len(inputs))(*(tensor.data_ptr() for tensor in inputs)),
            (c_void_p * len(outputs))(*(tensor.data_ptr() for tensor in outputs)),
            c_void_p(workspace.data_ptr()),
            self._library.stream(),
        )
        self._library.check(code == 0, self._name)

    def __del__(self) -> None:
        if self._node:
            self._library.driver.harness_destroy(self._node)


def _field(value: int | float | str) -> tuple[int, ctypes._SimpleCData | ctypes.Array, int]:
    """(kind as driver.cpp numbers them, memory, length) of an attribute."""
    if isinstance(value, str):
        return 2, ctypes.create_string_buffer(value.encode()), len(value)
    return (1, c_float(value), 1) if isinstance(value, float) else (0, c_int32(value), 1)
