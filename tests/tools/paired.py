"""Two installations of dfssm in alternating processes: how long a load and a decode step take in one and the other.

    python tests/tools/paired.py OLD_PYTHON OLD_BUNDLE NEW_PYTHON NEW_BUNDLE [--steps N] [--threads N] [--rounds N]

The bundles are of one model, each made by its installation. Prints medians over the rounds, and the median, least and
largest ratio new / old of a round.
"""

import argparse
import os
import statistics
import subprocess

ONE = """
import sys, time
import numpy as np
from dfssm.runtime import Engine

bundle, steps, threads = sys.argv[1], *map(int, sys.argv[2:])
start = time.perf_counter()
engine = Engine.load(bundle, threads=threads)
load, state, token, times = time.perf_counter() - start, engine.new_state(), np.array([5]), []
engine.prefill(np.arange(1, 33)[None], state)
for _ in range(20):
    start = time.perf_counter()
    for _ in range(steps):
        engine.step(token, state)
    times.append((time.perf_counter() - start) / steps)
print(load, min(times))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("old_python", "old_bundle", "new_python", "new_bundle"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=100, help="of a block; the fastest of 20 blocks counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()

    # As a user's: with the modules' bytecode, written in the rounds that do not count.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(python: str, bundle: str) -> list[float]:
        command = [python, "-c", ONE, bundle, str(given.steps), str(given.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return [float(word) * 1e3 for word in done.stdout.split()]

    rounds = [
        (run(given.old_python, given.old_bundle), run(given.new_python, given.new_bundle))
        for _ in range(given.rounds + 1)
    ][1:]
    for i, name in enumerate(("load", "step")):
        ratios = [new[i] / old[i] for old, new in rounds]
        old, new = (statistics.median(pair[side][i] for pair in rounds) for side in (0, 1))
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name}: {old:.3f} ms, {new:.3f} ms; new / old {spread}")


if __name__ == "__main__":
    main()
