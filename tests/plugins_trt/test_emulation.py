"""The emulation itself: it computes what CUDA's documents say, and it catches each of the faults it is there for."""

import numpy as np
import pytest
from plugins_trt import emulated
from plugins_trt.emulated import UNINITIALISED, WRITTEN, EmulationError

INVALID_CONFIGURATION, LAUNCH_FAILURE = 9, 719
IN = np.arange(128, dtype=np.float32)


@pytest.fixture(scope="module")
def emulation() -> emulated.Emulation:
    if not emulated.compiler():
        pytest.skip("no g++ here: the emulation needs its -fsanitize=thread")
    folder = emulated.ROOT / "tests/plugins_trt"
    sources = [folder / "faults.cu", folder / "primitives.cu"]
    return emulated.Emulation(emulated.build("dfssm_trt_emulation_tests", sources, api=False))


def run(emulation, kernel: str) -> np.ndarray:
    out = emulation.new("out", 128)
    emulation.call(f"run_{kernel}", emulation.put("in", IN), out)
    return out


RIGHT = {
    "copy": IN,
    "read_wide": IN,
    "last_block_sums": [6.0],
    "reverse": IN[63::-1],
    "reverse_dynamic": np.concatenate([IN[63::-1], IN[:63:-1]]),
    "add_atomically": [IN[:64].sum()],
    "bytes_of_one_word": IN[63::-1],
    "warp_exchange": IN[:64].reshape(32, 2)[:, ::-1].ravel(),
    "half_warps_exchange": IN[:32].reshape(16, 2)[:, ::-1].ravel(),
    "block_leaves": np.ones(64),
    "async_copy": IN[:95:-1],
    "much_shared_memory": [],
    "some_lanes_only": [],
}

WRONG = {
    "read_past_end": "thread (63,0,0): reads 4 bytes at byte 512 of in (512 bytes): out of bounds",
    "read_before_begin": "reads 4 bytes at byte -4 of in (512 bytes): out of bounds",
    "write_past_end": "thread (128,0,0): writes 4 bytes at byte 512 of out (512 bytes): out of bounds",
    "write_one_byte_past_end": "writes 1 bytes at byte 512 of out (512 bytes): out of bounds",
    "write_constant": "writes 4 bytes at byte 0 of in (512 bytes): the buffer is read-only",
    "read_unwritten": "reads 4 bytes at byte 4 of out (512 bytes): nobody has written it",
    "read_null": "reads 4 bytes at an address near no buffer: out of bounds",
    "read_wide_misaligned": "reads 16 bytes at byte 4 of in (512 bytes): misaligned",
    "read_wide_across_end": "reads 8 bytes at byte 512 of in (512 bytes): out of bounds",
    "blocks_write_the_same": "block (1,0,0), thread (0,0,0): writes 4 bytes at byte 0 of out (512 bytes): "
    "a race with the store of another block",
    "block_reads_of_another": "a race with the store of another block",
    "block_overwrites_what_another_read": "a race with the store of another block",
    "dynamic_past_end": "writes 4 bytes at byte 252 of dynamic shared memory (252 bytes): out of bounds",
    "static_past_end": "writes 4 bytes at byte 252 of a shared array (252 bytes): out of bounds",
    "static_into_next": "writes 4 bytes at byte 16 of a shared array (16 bytes): out of bounds",
    "shared_unwritten": "thread (58,0,0): reads 4 bytes at byte 20 of a shared array (256 bytes): nobody has",
    "shared_of_last_block": "block (1,0,0), thread (0,0,0): reads 4 bytes at byte 0 of a shared array (4 bytes): "
    "nobody has written it",
    "increment_unwritten": "reads 4 bytes at byte 0 of a shared array (4 bytes): nobody has written it",
    "read_without_barrier": "thread (32,0,0): reads 4 bytes at byte 0 of a shared array (256 bytes): "
    "a race with the store of thread 0",
    "write_without_barrier": "thread (33,0,0): writes 4 bytes at byte 132 of a shared array (256 bytes): "
    "a race with the load of thread 32",
    "write_the_same": "thread (1,0,0): writes 4 bytes at byte 0 of a shared array (4 bytes): "
    "a race with the store of thread 0",
    "increment_the_same": "a race with the store of thread 63",
    "read_what_atomics_write": "updates 4 bytes at byte 0 of a shared array (4 bytes): a race with the load of thread",
    "warp_exchange_unsynced": "a race with the store of thread",
    "warp_overwrites_unsynced": "a race with the store of thread",
    "warp_overwrites_what_it_read": "a race with the load of thread 31",
    "half_warps_mixed": "thread (31,0,0): reads 4 bytes at byte 60 of a shared array (128 bytes): "
    "a race with the store of thread 15",
    "other_warp_synced_only_itself": "thread (63,0,0): reads 4 bytes at byte 124 of a shared array (256 bytes): "
    "a race with the store of thread 31",
    "left_before_barrier": "thread (7,0,0): leaves the kernel while 7 threads of its block wait at the barrier of",
    "left_at_barrier": "thread (60,0,0): leaves the kernel while 60 threads",
    "two_barriers": "thread (32,0,0): is at the barrier of",
    "barrier_and_shuffle": "waits in a shuffle for lanes that never come (mask 0xffffffff, arrived 0xffff0000)",
    "mask_without_caller": "calls a shuffle with mask 0x7fffffff, which does not name its lane 31",
    "mask_with_lane_that_left": "calls a shuffle with mask 0xffffffff; lane 0 has left the kernel or never was",
    "lane_leaves_shuffle": "leaves the kernel while lanes wait for it in a shuffle, mask 0xffffffff",
    "mask_beyond_block": "calls a vote with mask 0xffffffff; lane 16 has left the kernel or never was",
    "shuffle_from_outside": "shuffles from lane 20, which is not in its mask 0x0000ffff",
    "masks_differ": "leaves the kernel while lanes wait for it in a shuffle, mask 0xffffffff",
    "vote_beside_shuffle": "calls a vote with mask 0xffffffff while lanes of it wait in a shuffle with mask 0xffffffff",
    "async_copy_not_waited_for": "thread (31,0,0): reads 4 bytes at byte 636 of dynamic shared memory (1024 bytes): "
    "nobody has written it",
    "async_copy_forgotten": "leaves the kernel with asynchronous copies it never waited for",
    "too_much_static_shared_memory": "declares 49153 bytes of static shared memory",
}

REFUSED = {
    "too_many_threads": "a block of 1025 x 1 x 1 threads",
    "too_many_threads_deep": "a block of 4 x 4 x 65 threads",
    "no_blocks": "a grid of 0 x 1 x 1 blocks",
    "too_many_rows_of_blocks": "a grid of 1 x 65536 x 1 blocks",
    "too_much_shared_memory": "",
    "not_opted_in": "49153 bytes of dynamic shared memory, opted in for 49152",
}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_run(emulation, kernel):
    out = run(emulation, kernel)
    np.testing.assert_array_equal(out[: len(RIGHT[kernel])], RIGHT[kernel])


@pytest.mark.parametrize("kernel", WRONG)
def test_faults_are_reported(emulation, kernel):
    with pytest.raises(EmulationError) as error:
        run(emulation, kernel)
    assert WRONG[kernel] in str(error.value)
    assert error.value.code == LAUNCH_FAILURE
    np.testing.assert_array_equal(run(emulation, "copy"), IN)  # the next launch is none the worse


def test_a_report_names_the_line(emulation):
    with pytest.raises(EmulationError, match=r"\[faults\.cu:\d+"):
        run(emulation, "read_past_end")


def test_a_launch_that_does_not_wait_for_the_one_before(emulation):
    emulation.library.dfssm_trt_dependent_launches(1)
    try:
        with pytest.raises(
            EmulationError, match="writes 4 bytes at byte 0 of out.*the launch before was not waited for"
        ):
            run(emulation, "copy")
    finally:
        emulation.library.dfssm_trt_dependent_launches(0)
    assert (run(emulation, "copy") == IN).all()


@pytest.mark.parametrize("kernel", REFUSED)
def test_impossible_launches_are_refused(emulation, kernel):
    with pytest.raises(EmulationError) as error:
        run(emulation, kernel)
    assert error.value.code == INVALID_CONFIGURATION
    assert REFUSED[kernel] in str(error.value)


def test_host_copies_and_fills_count_as_written(emulation):
    """cudaMemsetAsync and cudaMemcpyAsync before a kernel, as a plugin does them."""
    out = emulation.new("out", 128)
    emulation.call("run_fill_and_copy", emulation.put("in", IN), out)
    np.testing.assert_array_equal(out[:4], [0, IN[1], 0, IN[1]])


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("operand", [0, 1, 5, 31])
def test_shuffles_and_votes(emulation, operand, width):
    value = np.random.default_rng(operand).integers(-9, 10, 32, dtype=np.int32)
    out = emulation.new("out", (32, 8), np.int32)
    emulation.call("run_lanes", emulation.put("in", value), out, operand, width)
    lane = np.arange(32)
    segment, place = lane // width * width, lane % width
    up = np.where(place >= operand, lane - operand, lane)
    down = np.where(place + operand < width, lane + operand, lane)
    across = np.where((lane ^ operand) < segment + width, lane ^ operand, lane)
    for column, source in enumerate((segment + operand % width, up, down, across)):
        np.testing.assert_array_equal(out[:, column], value[source], err_msg=f"column {column}")
    ballot = sum(1 << i for i in lane if value[i] > 0)
    assert (out[:, 4].view(np.uint32) == ballot).all()
    assert (out[:, 5] == (value > operand).any() + 2 * (value > -operand).all()).all()
    assert (out[:, 6] == value.sum()).all() and (out[:, 7] == value.max()).all()


def test_votes_of_a_block(emulation):
    value = np.random.default_rng(0).integers(-99, 100, 60, dtype=np.int32)
    out = emulation.new("out", (60, 3), np.int32)
    emulation.call("run_votes_of_block", emulation.put("in", value), out)
    assert (out == [(value > 0).sum(), 1, 0]).all()


def test_positions(emulation):
    out = emulation.new("out", (2, 3, 2, 2, 2, 3, 6), np.int32)  # blocks z y x, threads z y x
    emulation.call("run_positions", out)
    z, y, x, c, b, a = np.indices(out.shape[:-1])
    np.testing.assert_array_equal(out, np.stack([a, b, c, x, y, z], -1))


def test_mma(emulation):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, 32), dtype=np.int8), rng.integers(-128, 128, (8, 32), dtype=np.int8)
    before = rng.integers(-(2**30), 2**30, (16, 8), dtype=np.int32)
    d = emulation.put("d", before, WRITTEN)
    emulation.call("run_mma", emulation.put("a", a), emulation.put("b", b), d)
    np.testing.assert_array_equal(d, before + a.astype(np.int32) @ b.astype(np.int32).T)


def test_mma_of_fp16(emulation):
    """Whole numbers are exact; else a sum is cut, to no more than it may be on a device: 24 bits of the largest term,
    eight products at a time."""
    rng = np.random.default_rng(0)
    for a, b, before in (
        (rng.integers(-64, 65, (16, 16)), rng.integers(-64, 65, (8, 16)), rng.integers(-(2**20), 2**20, (16, 8))),
        (rng.standard_normal((16, 16)), rng.standard_normal((8, 16)), rng.standard_normal((16, 8)) * 100),
    ):
        a, b, before = a.astype(np.float16), b.astype(np.float16), before.astype(np.float32)
        d = emulation.put("d", before, WRITTEN)
        emulation.call("run_mma_half", emulation.put("a", a), emulation.put("b", b), d)
        products = a.astype(np.float64)[:, None] * b.astype(np.float64)
        exact = before + products.sum(-1)
        if (exact % 1 == 0).all():
            np.testing.assert_array_equal(d, exact)
            continue
        largest = np.maximum(np.abs(products).max(-1), np.maximum(np.abs(before), np.abs(exact)))
        error = np.abs(d - exact)
        assert (error <= 20 * 2.0**-23 * largest).all() and (error > 2.0**-24 * np.abs(exact)).any()


def test_mma_of_fp16_that_are_not_finite(emulation):
    a, b = np.zeros((16, 16), np.float16), np.ones((8, 16), np.float16)
    a[1, 2], a[3, 9], a[5, 0], a[5, 15] = np.inf, np.nan, np.inf, -np.inf
    d = emulation.put("d", np.zeros((16, 8), np.float32), WRITTEN)
    emulation.call("run_mma_half", emulation.put("a", a), emulation.put("b", b), d)
    expected = np.zeros((16, 8))
    expected[1], expected[3], expected[5] = np.inf, np.nan, np.nan
    np.testing.assert_array_equal(d, expected)


def test_matrices_of_16_bit_numbers(emulation):
    """ldmatrix: lane 4 g + t has (g, 2 t) and (g, 2 t + 1) of each; transposed (2 t, g) and (2 t + 1, g)."""
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = emulation.new("out", (2, 4, 32, 2), np.uint16)
    emulation.call("run_matrices", emulation.put("in", matrices), out, 0)
    np.testing.assert_array_equal(out[0], matrices.reshape(4, 32, 2))
    np.testing.assert_array_equal(out[1], matrices.transpose(0, 2, 1).reshape(4, 32, 2))
    out = emulation.new("out", (2, 4, 32, 2), np.uint16)
    with pytest.raises(EmulationError, match="no multiple of 16"):
        emulation.call("run_matrices", emulation.put("in", matrices), out, 2)


def test_words(emulation):
    n = 300
    a, b, c = np.random.default_rng(0).integers(0, 2**32, (3, n), dtype=np.uint32)
    a[:3], b[:3] = (0, 0x80808080, 0xFFFFFFFF), (0, 0x80808080, 1)
    out = emulation.new("out", (n, 10), np.uint32)
    emulation.call("run_words", *(emulation.put(name, v) for name, v in zip("abc", (a, b, c), strict=True)), out, n)

    def bytes_of(x, dtype):
        return x.view(dtype).reshape(n, 4)

    def dot(dtype):
        return (bytes_of(a, dtype).astype(np.int64) * bytes_of(b, dtype)).sum(1) + c

    both = np.concatenate([bytes_of(a, np.uint8), bytes_of(b, np.uint8)], 1)
    selector = c[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 7
    wide, shift = b.astype(np.uint64) << np.uint64(32) | a, (c & 31).astype(np.uint64)
    binary = [f"{x:032b}" for x in a]
    expected = [
        dot(np.int8),
        dot(np.uint8),
        np.take_along_axis(both, selector, 1).copy().view(np.uint32)[:, 0],
        [x.count("1") for x in binary],
        [len(x) - len(x.lstrip("0")) for x in binary],
        [int(x[::-1], 2) for x in binary],
        (wide << shift) >> np.uint64(32),
        wide >> shift,
        (bytes_of(a, np.uint8) + bytes_of(b, np.uint8)).view(np.uint32)[:, 0],
        (bytes_of(a, np.uint8) - bytes_of(b, np.uint8)).view(np.uint32)[:, 0],
    ]
    for column, values in enumerate(expected):
        low = (np.asarray(values).astype(np.uint64) & 0xFFFFFFFF).astype(np.uint32)
        np.testing.assert_array_equal(out[:, column], low, err_msg=f"column {column}")


def test_roundings(emulation):
    """fp32 to whole numbers and fp16: every exponent, ties, infinities and NaN."""
    rng = np.random.default_rng(0)
    every = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    halves = np.arange(0, 0x7C00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2  # not of two neighbours, but exact fp32 numbers near the fp16 grid
    step = np.float32(2.0**-25)
    grid = np.arange(0, 3000, dtype=np.float32) * step  # around the subnormals of fp16, ties among them
    special = [
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.996,
        65520,
        -65520,
        0.5,
        1.5,
        2.5,
        -0.5,
        2**31,
        -(2**31),
        3e9,
        -3e9,
    ]
    x = np.concatenate([every.view(np.float32), halves, ties, grid, -grid, np.array(special, np.float32)])
    out = emulation.new("out", (x.size, 2), np.uint32)
    emulation.call("run_roundings", emulation.put("in", x), out, x.size)
    with np.errstate(all="ignore"):
        whole = np.clip(np.rint(np.nan_to_num(x.astype(np.float64), nan=0.0)), -(2.0**31), 2.0**31 - 1)
        half = np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(out[:, 0].view(np.int32), whole.astype(np.int32))
    np.testing.assert_array_equal(out[:, 1], half)


def test_widenings(emulation):
    """Every fp16."""
    bits = np.arange(2**16, dtype=np.uint16)
    out = emulation.new("out", bits.size)
    emulation.call("run_widenings", emulation.put("in", bits), out, bits.size)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))


def test_uninitialised_buffers_hold_no_numbers(emulation):
    """What `put` leaves in a buffer that nobody has written, for kernels that are not instrumented."""
    room = emulation.put("room", np.zeros(3, np.float32), UNINITIALISED)
    assert np.isnan(room).all()
    emulation.forget()
