"""Packing of the 1-bit scaffold: NumPy, any leading axes, M rows by K columns. layouts.py says where each bit goes."""

from typing import Any

import numpy as np

from dfssm.base.errors import DfssmError

from .layouts import Layout

Array = np.ndarray[Any, np.dtype[Any]]


def pack_bits(signs: Array) -> Array:
    """Signs (> 0 is +1, anything else -1) [..., M, K] -> canonical bits u8 [..., M, K/8]. K % 8 == 0."""
    if signs.shape[-1] % 8:
        raise DfssmError(f"pack_bits: K is {signs.shape[-1]}, expected a multiple of 8")
    return np.packbits(signs > 0, axis=-1, bitorder="little")


def unpack_bits(bits: Array) -> Array:
    """Canonical bits u8 [..., M, K/8] -> signs int8 (+1, -1) [..., M, K]."""
    return np.unpackbits(bits, axis=-1, bitorder="little").astype(np.int8) * np.int8(2) - np.int8(1)


def _pad_rows(a: Array, layout: Layout) -> Array:
    pad = layout.padded(a.shape[-2]) - a.shape[-2]
    return np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, pad), (0, 0)])


def _axes(layout: Layout, rows: int, columns: int) -> tuple[int, ...]:
    """Sizes of (block, row, tile, *column) of a matrix of whole tiles."""
    return rows // layout.rows, layout.rows, columns // layout.columns, *layout.split


def _reorder(bits: Array, sizes: tuple[int, ...], order: tuple[int, ...]) -> Array:
    """Bits u8 [..., rows, width], taken as axes of these `sizes`, in another order."""
    n = bits.ndim - 2
    axes = np.unpackbits(bits, axis=-1, bitorder="little").reshape(*bits.shape[:-2], *sizes)
    moved = axes.transpose(*range(n), *(n + axis for axis in order))
    return np.packbits(moved.reshape(*bits.shape, 8), axis=-1, bitorder="little")[..., 0]


def to_layout(bits: Array, layout: Layout) -> Array:
    """Canonical bits u8 [..., M, K/8] -> those of a layout, u8 [..., Mp, K/8]. K is in whole tiles."""
    if bits.shape[-1] * 8 % layout.columns:
        raise DfssmError(f"to_{layout.name}: K is {bits.shape[-1] * 8}, expected a multiple of {layout.columns}")
    bits = _pad_rows(bits, layout)
    return _reorder(bits, _axes(layout, bits.shape[-2], bits.shape[-1] * 8), layout.order)


def from_layout(stored: Array, rows: int, layout: Layout) -> Array:
    """Bits of a layout u8 [..., Mp, K/8] -> canonical bits u8 [..., rows, K/8]; the inverse of `to_layout`."""
    sizes = _axes(layout, stored.shape[-2], stored.shape[-1] * 8)
    back = tuple(layout.order.index(axis) for axis in range(len(sizes)))
    return _reorder(stored, tuple(sizes[axis] for axis in layout.order), back)[..., :rows, :]


def up_to_layout(up: Array, layout: Layout) -> Array:
    """`up` i8 [M, R] -> [Mp/rows, R, rows] viewed as [Mp, R]."""
    up = _pad_rows(up, layout)
    padded, rank = up.shape
    blocks = up.reshape(padded // layout.rows, layout.rows, rank)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(padded, rank)


def up_from_layout(up: Array, rows: int, layout: Layout) -> Array:
    """Inverse of `up_to_layout`: i8 [Mp, R] -> [rows, R]."""
    padded, rank = up.shape
    blocks = up.reshape(padded // layout.rows, rank, layout.rows)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(padded, rank)[:rows]
