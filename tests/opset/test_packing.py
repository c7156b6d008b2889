"""Packing, both layouts: against a bit-by-bit reading of the definition, and there and back."""

import numpy as np
import pytest

from dfssm.opset import DfssmError
from dfssm.opset.layouts import LAYOUT_ROW16, LAYOUTS
from dfssm.opset.packing import from_layout, pack_bits, to_layout, unpack_bits, up_from_layout, up_to_layout

ROW16 = LAYOUTS[LAYOUT_ROW16]


def signs(*shape):
    return np.random.default_rng(sum(shape)).choice(np.array([-1, 1], np.int8), shape)


def test_hand_packed_row():
    row = np.full((1, 32), -1, np.int8)
    row[0, [0, 9, 31]] = 1
    assert pack_bits(row).tolist() == [[0b1, 0b10, 0, 0b10000000]]


def test_zero_counts_as_minus_one():
    assert unpack_bits(pack_bits(np.zeros((1, 8), np.float32))).tolist() == [[-1] * 8]


@pytest.mark.parametrize("shape", [(1, 32), (15, 32), (16, 64), (17, 96), (33, 256), (2, 5, 64), (3, 2, 16, 32)])
def test_there_and_back(shape):
    s = signs(*shape)
    bits = pack_bits(s)
    assert bits.shape == (*shape[:-1], shape[-1] // 8)
    np.testing.assert_array_equal(unpack_bits(bits), s)
    tiles = to_layout(bits, ROW16)
    assert tiles.shape == (*shape[:-2], ROW16.padded(shape[-2]), shape[-1] // 8)
    np.testing.assert_array_equal(from_layout(tiles, shape[-2], ROW16), bits)


def test_row16_bit_by_bit():
    rows, columns = 33, 96
    s = signs(rows, columns)
    tiles = to_layout(pack_bits(s), ROW16).reshape(-1)
    for m in range(ROW16.padded(rows)):
        for k in range(columns):
            tile = (m // 16) * (columns // 32) + k // 32
            byte = tiles[tile * 64 + (m % 16) * 4 + k % 4]
            bit = byte >> ((k % 32) // 4) & 1
            assert bit == (m < rows and s[m, k] == 1), (m, k)


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (16, 4), (17, 3), (40, 16), (5, 0)])
def test_up_row16(rows, rank):
    up = np.random.default_rng(0).integers(-127, 128, (rows, rank), dtype=np.int8)
    packed = up_to_layout(up, ROW16)
    assert packed.shape == (ROW16.padded(rows), rank)
    np.testing.assert_array_equal(up_from_layout(packed, rows, ROW16), up)
    flat = packed.reshape(-1)
    for m in range(rows):
        for r in range(rank):
            assert flat[((m // 16) * rank + r) * 16 + m % 16] == up[m, r]


def test_columns_must_fill_words():
    with pytest.raises(DfssmError, match="K is 12"):
        pack_bits(np.ones((1, 12)))
    with pytest.raises(DfssmError, match="multiple of 32"):
        to_layout(np.zeros((16, 5), np.uint8), ROW16)
