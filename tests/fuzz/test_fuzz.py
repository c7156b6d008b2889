"""The fuzz entries over their seeds and a fixed number of mutations; `make fuzz SECONDS=N` goes on from there."""

import contextlib
import random
import subprocess
from pathlib import Path

import pytest
from fuzz import entries, native

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", entries.ENTRIES)
def test_a_reader_reads_or_refuses_whatever_it_is_given(name):
    entry, seeds = entries.ENTRIES[name], entries.seeds(name)
    for seed in seeds:
        with contextlib.suppress(entries.OutOfBounds):  # the first time, imports count as memory of the reader
            entries.check(name, seed)
    for seed in seeds:
        entries.check(name, seed)
    for number in range(entry.runs):
        rng = random.Random(number)
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = entry.mutation(data, rng)
        try:
            entries.check(name, data)
        except BaseException as error:
            error.add_note(f"mutation {number}: {data[:200]!r}")
            raise


def test_a_finding_is_one(monkeypatch):
    """What check() lets through would be missed everywhere."""

    def entry(read):
        return entries.Entry("a", list, read, lambda data, rng: data)

    def two_lines(path):
        error = entries.DfssmError("")
        error.args = ("one\ntwo",)  # the class itself joins lines
        raise error

    for read, found in (
        (lambda path: 1 / 0, ZeroDivisionError),
        (two_lines, AssertionError),
        (lambda path: bytearray(entries.SPARE * 2), entries.OutOfBounds),
    ):
        monkeypatch.setitem(entries.ENTRIES, "a", entry(read))
        with pytest.raises(found):
            entries.check("a", b"")


def test_seeds_are_small():
    assert sum(path.stat().st_size for path in (HERE / "seeds").rglob("*") if path.is_file()) <= 20_000


@pytest.fixture(scope="session")
def programs():
    """A minute where they are not built yet."""
    try:
        return {path.name: path for path in native.build()}
    except native.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", native.NAMES)
def test_kernels_on_hostile_inputs(name, programs):
    done = subprocess.run(
        [programs[name], "-seed=1", "-runs=300", "-max_len=512", "-verbosity=0"],
        capture_output=True, text=True, timeout=120, cwd=native.BUILD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
