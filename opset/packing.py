"""Packing of the 1-bit scaffold: NumPy, any leading axes, M rows by K columns.

layout 0 (canonical, the one in model.pt): `bits` u8 [M, K/8]; bit k of a row is byte k/8, position k%8, LSB first;
1 is +1, 0 is -1. `up` i8 [M, R].

layout 1 (row16, the one the CPU kernels stream): rows are padded with zero bits to Mp = 16*ceil(M/16) and cut into
tiles of 16 rows x 32 columns = 64 bytes. In the tile (blk, c), byte 4*lane + b, bit j is row 16*blk + lane, column
32*c + 4*j + b. So `tile & (1 << j)` holds, in the dword of each lane, four neighbouring columns of that lane's row,
which is what VPDPBUSD multiplies with a broadcast dword of four neighbouring activations: no expansion and no shuffle.
Tiles of one block of 16 rows are consecutive, so a block is one sequential stream. `up` is stored [Mp/16, R, 16]
(then viewed as [Mp, R]) so that one row of 16 lanes takes one multiply-add a rank. Byte counts equal layout 0 padded.
"""

import numpy as np

from .errors import DfssmError

ROWS, COLUMNS = 16, 32
"""Tile of layout 1."""


def pack_bits(signs: np.ndarray) -> np.ndarray:
    """Signs (> 0 is +1, anything else -1) [..., M, K] -> canonical bits u8 [..., M, K/8]. K % 8 == 0."""
    if signs.shape[-1] % 8:
        raise DfssmError(f"pack_bits: K is {signs.shape[-1]}, expected a multiple of 8")
    return np.packbits(signs > 0, axis=-1, bitorder="little")


def unpack_bits(bits: np.ndarray) -> np.ndarray:
    """Canonical bits u8 [..., M, K/8] -> signs int8 (+1, -1) [..., M, K]."""
    return np.unpackbits(bits, axis=-1, bitorder="little").astype(np.int8) * np.int8(2) - np.int8(1)


def padded_rows(rows: int) -> int:
    """Mp: `rows` rounded up to whole tiles of layout 1."""
    return -(-rows // ROWS) * ROWS


def _pad_rows(a: np.ndarray) -> np.ndarray:
    pad = padded_rows(a.shape[-2]) - a.shape[-2]
    return np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, pad), (0, 0)])


def to_row16(bits: np.ndarray) -> np.ndarray:
    """Canonical bits u8 [..., M, K/8] -> layout 1, u8 [..., Mp, K/8]. K % 32 == 0."""
    if bits.shape[-1] % 4:
        raise DfssmError(f"to_row16: K is {bits.shape[-1] * 8}, expected a multiple of {COLUMNS}")
    bits = _pad_rows(bits)
    lead, (rows, width) = bits.shape[:-2], bits.shape[-2:]
    # (blk, lane, c, j, b) -> (blk, c, lane, b, j): column 4*j + b of a tile becomes bit j of byte b.
    columns = np.unpackbits(bits, axis=-1, bitorder="little")
    columns = columns.reshape(*lead, rows // ROWS, ROWS, width // 4, 8, 4)
    n = len(lead)
    tiles = columns.transpose(*range(n), n, n + 2, n + 1, n + 4, n + 3)
    return np.packbits(tiles, axis=-1, bitorder="little").reshape(*lead, rows, width)


def from_row16(tiles: np.ndarray, rows: int) -> np.ndarray:
    """Layout 1 u8 [..., Mp, K/8] -> canonical bits u8 [..., rows, K/8]; the inverse of `to_row16`."""
    lead, (padded, width) = tiles.shape[:-2], tiles.shape[-2:]
    n = len(lead)
    bits = np.unpackbits(tiles.reshape(*lead, padded // ROWS, width // 4, ROWS, 4, 1), axis=-1, bitorder="little")
    columns = bits.transpose(*range(n), n, n + 2, n + 1, n + 4, n + 3).reshape(*lead, padded, width * 8)
    return np.packbits(columns, axis=-1, bitorder="little")[..., :rows, :]


def up_to_row16(up: np.ndarray) -> np.ndarray:
    """`up` i8 [M, R] -> layout 1: [Mp/16, R, 16] viewed as [Mp, R]."""
    up = _pad_rows(up)
    rows, rank = up.shape
    return np.ascontiguousarray(up.reshape(rows // ROWS, ROWS, rank).transpose(0, 2, 1)).reshape(rows, rank)


def up_from_row16(up: np.ndarray, rows: int) -> np.ndarray:
    """Inverse of `up_to_row16`: i8 [Mp, R] -> [rows, R]."""
    padded, rank = up.shape
    return np.ascontiguousarray(up.reshape(padded // ROWS, rank, ROWS).transpose(0, 2, 1)).reshape(padded, rank)[:rows]
