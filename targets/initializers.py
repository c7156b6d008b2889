"""Which weights of a graph lie in a file beside it, read from the graph's own bytes: protobuf's wire format, without
the package onnx, which need not be installed where a bundle runs.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 7: np.int64, 10: np.float16}  # by TensorProto.DataType

# Numbers of the fields of onnx.proto that are read here.
_GRAPH = 7  # of ModelProto
_INITIALIZER = 5  # of GraphProto
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA = 1, 2, 8, 13  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto

_FIXED = {1: 8, 5: 4}  # bytes of the wire types that have always as many

Field = int | memoryview


class External(NamedTuple):
    """A weight that lies in the file `location`, from `offset` on, in row-major order."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    location: str
    offset: int

    def of(self, content: np.ndarray) -> np.ndarray:
        """The weight in the file's `content` u8[bytes], without a copy. ValueError where it cannot lie there."""
        end = self.offset + math.prod(self.shape) * self.dtype.itemsize
        if min(self.offset, *self.shape, 0) < 0 or end > len(content) or self.offset % self.dtype.itemsize:
            raise ValueError(f"{self.name} cannot lie in the {len(content)} bytes of {self.location}")
        return content[self.offset : end].view(self.dtype).reshape(self.shape)


def externals(graph: bytes) -> list[External]:
    """The weights of a ModelProto that lie in other files. ValueError for bytes that are no such graph."""
    tensors = (t for body in _messages(memoryview(graph), _GRAPH) for t in _messages(body, _INITIALIZER))
    return [external for tensor in tensors if (external := _external(tensor))]


def _external(tensor: memoryview) -> External | None:
    """The weight; None where it lies in the graph."""
    place: dict[str, str] = {}
    shape: list[int] = []
    name, dtype = "", 0
    for field, value in _fields(tensor):
        if field == _DIMS:  # one, or all of them packed
            shape += [value] if isinstance(value, int) else _varints(value)
        elif field == _DATA_TYPE and isinstance(value, int):
            dtype = value
        elif field == _NAME:
            name = bytes(_message(value)).decode()
        elif field == _EXTERNAL_DATA:
            entry = {of: bytes(_message(text)).decode() for of, text in _fields(_message(value))}
            place[entry.get(_KEY, "")] = entry.get(_VALUE, "")
    if not place:
        return None
    if dtype not in _DTYPES or "location" not in place:
        raise ValueError(f"{name or 'an initializer'} is of a kind that dfcompile does not write")
    return External(name, np.dtype(_DTYPES[dtype]), tuple(shape), place["location"], int(place.get("offset", "0")))


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    return (_message(value) for field, value in _fields(message) if field == number)


def _message(value: Field) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it is no ONNX graph")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, Field]]:
    """The fields of a message by their numbers: integers, and the bytes of everything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError("it is no ONNX graph")
        if size > len(message) - at:
            raise ValueError("it is cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer and where it ends: seven bits a byte, the lowest first, the top bit set where more follow."""
    if at < len(message) and message[at] < 0x80:  # most of them
        return message[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise ValueError("it is cut off")
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is no ONNX graph")


def _varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    return values
