"""Packing, both layouts: against a bit-by-bit reading of the definition, and there and back."""

import numpy as np
import pytest

from dfssm.base import DfssmError
from dfssm.opset.layouts import LAYOUT_ROW16, LAYOUT_ROW64, LAYOUTS
from dfssm.opset.packing import from_layout, pack_bits, to_layout, unpack_bits, up_from_layout, up_to_layout

ROW16, ROW64 = LAYOUTS[LAYOUT_ROW16], LAYOUTS[LAYOUT_ROW64]


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


def test_row64_bit_by_bit():
    rows, columns = 65, 96
    s = signs(rows, columns)
    tiles = to_layout(pack_bits(s), ROW64).reshape(-1)
    for m in range(ROW64.padded(rows)):
        for k in range(columns):
            bit = tiles[((m // 64) * (columns // 8) + k // 8) * 64 + m % 64] >> k % 8 & 1
            assert bit == (m < rows and s[m, k] == 1), (m, k)


@pytest.mark.parametrize("layout", [ROW16, ROW64], ids=lambda layout: layout.name)
@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (16, 4), (17, 3), (64, 2), (70, 16), (5, 0)])
def test_up_in_blocks(layout, rows, rank):
    up = np.random.default_rng(0).integers(-127, 128, (rows, rank), dtype=np.int8)
    packed = up_to_layout(up, layout)
    assert packed.shape == (layout.padded(rows), rank)
    np.testing.assert_array_equal(up_from_layout(packed, rows, layout), up)
    flat, block = packed.reshape(-1), layout.rows
    for m in range(rows):
        for r in range(rank):
            assert flat[((m // block) * rank + r) * block + m % block] == up[m, r]


def test_columns_must_fill_words():
    with pytest.raises(DfssmError, match="K is 12"):
        pack_bits(np.ones((1, 12)))
    with pytest.raises(DfssmError, match="multiple of 32"):
        to_layout(np.zeros((16, 5), np.uint8), ROW16)
