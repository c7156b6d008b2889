"""Fuzz one entry with atheris (libFuzzer, led by the coverage of our modules):

    PYTHONPATH=tests:build/fuzz/python python -m fuzz.run ENTRY [--seconds N] [--runs N] [--out FOLDER]

A finding is written to FOLDER and does not end the run; one of a kind, which is the exception and the line of ours that
it came through. Prints executions and findings; status 1 if there are any. What ends the process, an abort in a
library, is written by libFuzzer itself, as FOLDER/ENTRY-crash-*.
"""

import argparse
import contextlib
import gc
import math
import os
import random
import sys
import time
import traceback
import types
from pathlib import Path

import atheris

from . import entries

ROOT = Path(__file__).parents[2]


def place(error: BaseException) -> str:
    """Where in our files it happened; the last of them that is not a test."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if str(ROOT) in frame.filename and "site-packages" not in frame.filename]
    product = [frame for frame in ours if "tests" not in Path(frame.filename).parts] or ours
    return f"{Path(product[-1].filename).name}:{product[-1].lineno}" if product else "?"


class Fuzzer:
    def __init__(self, name: str, out: Path, runs: int, seconds: float):
        self.name, self.out, self.runs, self.until = name, out, runs, time.monotonic() + seconds
        self.executions, self.read = 0, 0
        self.findings: dict[str, bytes] = {}

    def one_input(self, data: bytes) -> None:
        # libFuzzer would end the process by itself, without a word to Python.
        if self.executions == self.runs or time.monotonic() > self.until:
            print(f"{self.name}: {self.executions} executions, {self.read} read, {len(self.findings)} findings")
            sys.stdout.flush()
            entries.clean()
            os._exit(bool(self.findings))
        self.executions += 1
        try:
            self.read += entries.check(self.name, data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            kind = f"{type(error).__name__} at {place(error)}"
            known = self.findings.get(kind)
            if known is None or len(data) < len(known):
                self.findings[kind] = data
                file = "".join(letter if letter.isalnum() else "_" for letter in f"{self.name} {kind}")
                (self.out / file).write_bytes(data)
                if known is None:
                    print(f"{self.name}: {kind}: {str(error)[:200]!r}: {len(data)} bytes", flush=True)

    def mutated(self, data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, limit)
        return entries.ENTRIES[self.name].mutation(data, rng)[:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entry", choices=entries.ENTRIES)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=ROOT / "build/fuzz/findings")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    fuzzer = Fuzzer(given.entry, given.out, given.runs, given.seconds)
    corpus = given.out.parent / "corpus" / given.entry
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(entries.seeds(given.entry)):
        (corpus / f"seed-{number}").write_bytes(seed)
        with contextlib.suppress(Exception):  # the first time, imports count as memory of the reader
            entries.check(given.entry, seed)
    # Not atheris.instrument_imports, which leaves the code of an editable install as it is.
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and (function.__module__ or "").startswith("dfssm."):
            atheris.instrument_func(function)
    options = [
        "-max_len=300000", "-rss_limit_mb=4096", "-timeout=30", "-verbosity=0",
        f"-artifact_prefix={given.out}/{given.entry}-", str(corpus),
    ]  # fmt: skip
    os.environ["RUST_BACKTRACE"] = "0"
    atheris.Setup([sys.argv[0], *options], fuzzer.one_input, custom_mutator=fuzzer.mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
