"""How the bits of a scaffold may lie in memory: each layout by name, its index formula once. Standard library only.

A layout is a tile of `rows` x `columns`, and the order in which its bits are stored. Seen as numbers, the bits of a
matrix [M, K] are split into (block of rows, row of the block, tile of columns, *`split`), where `split` factors the
column within a tile. `order` says which of these axes comes when in memory: blocks and tiles first, so that a block is
one stream, and last the bit of a byte, LSB first. 1 is +1, 0 is -1; rows are padded with zero bits to whole tiles (Mp
rows). packing.py, the ONNX body and the generated C++ header follow these numbers; in any layout K % 32 == 0.
"""

from dataclasses import dataclass

LAYOUT_CANONICAL, LAYOUT_ROW16, LAYOUT_ROW64 = 0, 1, 2
"""Values of the attribute `layout` of BinaryScaffoldMatMul."""


@dataclass(frozen=True)
class Layout:
    """A tile and the order of its bits. `up` [M, R] is stored as [Mp/rows, R, rows], viewed as [Mp, R]."""

    name: str
    rows: int
    columns: int
    split: tuple[int, ...]
    order: tuple[int, ...]

    def padded(self, rows: int) -> int:
        """Mp: `rows` rounded up to whole tiles."""
        return -(-rows // self.rows) * self.rows


LAYOUTS = {
    # The one in model.pt: bit k of a row is byte k/8, position k%8.
    LAYOUT_CANONICAL: Layout("canonical", rows=1, columns=8, split=(8,), order=(0, 2, 1, 3)),
    # For AVX-512. In the tile (blk, c), 64 bytes, byte 4*lane + b, bit j is row 16*blk + lane,
    # column 32*c + 4*j + b. So `tile & (1 << j)` holds, in the dword of each lane, four neighbouring columns of that
    # lane's row, which is what VPDPBUSD multiplies with a broadcast dword of four neighbouring activations: no
    # expansion and no shuffle. Tiles of one block of 16 rows are consecutive, so a block is one sequential stream; one
    # row of 16 lanes of `up` takes one multiply-add a rank. Byte counts equal the canonical ones, padded.
    #        split into (blk, lane, c, j, b), stored as (blk, c, lane, b, j)
    LAYOUT_ROW16: Layout("row16", rows=16, columns=32, split=(8, 4), order=(0, 2, 1, 4, 3)),
    # For AVX2 and Arm. In the tile (blk, c), byte `lane` is row 64*blk + lane, its bit j column 8*c + j. So a nibble is
    # four columns of one row, which VPSHUFB or TBL looks up for 32 or 16 rows at once in a table of the 16 sums that
    # four activations have. Tiles of one block of 64 rows are consecutive.
    #        split into (blk, lane, c, j), stored as (blk, c, lane, j)
    LAYOUT_ROW64: Layout("row64", rows=64, columns=8, split=(8,), order=(0, 2, 1, 3)),
}
