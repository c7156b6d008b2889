"""Two installations of dfssm in alternating processes: the processor time of a step of `dfssm distill`.

    python tests/tools/training.py OLD_PATH NEW_PATH TEACHER TEXT [--steps N] [--rounds N] [OPTIONS of dfssm distill]

A PATH is a folder with the package `dfssm` in it (an older version: links to its parts, and an empty __init__.py). It
comes before those that this Python has, so that two versions share one environment. A step is timed from one batch of
windows to the next, on one thread: teacher, student, both passes and the update. Prints the median processor time of a
token of each, and the ratio of the speeds over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ONE = """
import json, resource, sys

sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__module__.startswith("_editable")]
import dfssm.distill.data as data
from dfssm.cli.main import main

times, take = [], data.Windows.take

def timed(self, count):
    used = resource.getrusage(resource.RUSAGE_SELF)
    times.append((used.ru_utime, used.ru_stime))
    return take(self, count)

data.Windows.take = timed
try:
    main(sys.argv[1:])
finally:
    print("TIMES", json.dumps(times))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("old_path", "new_path", "teacher", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=12, help="of a round; the first two do not count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    given, options = parser.parse_known_args()
    size = given.batch * given.tokens

    def run(path: Path) -> tuple[float, float]:
        """Seconds of a token: user and system, median over the steps."""
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", ONE, "distill", given.teacher, "--data", given.text, "-o", f"{folder}/run"]
            command += ["--batch", given.batch, "--tokens", given.tokens, "--total-tokens", given.steps * size]
            command += ["--held-out", 0, "--threads", 1, "--device", "cpu", *options]
            environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("TIMES ")]
        user, system = zip(*json.loads(line.removeprefix("TIMES ")), strict=True)
        count = given.steps
        return tuple(
            statistics.median(b - a for a, b in zip(side[2:count], side[3:count], strict=False)) / size
            for side in (user, system)
        )

    rounds = [(run(given.old_path), run(given.new_path)) for _ in range(given.rounds)]
    for side, name in enumerate(("old", "new")):
        user, system = (statistics.median(found[side][i] for found in rounds) * 1e6 for i in (0, 1))
        print(f"{name}: {user + system:.1f} us of processor time a token ({system:.1f} of them in the system)")
    ratios = [sum(old) / sum(new) for old, new in rounds]
    print(f"speed, new / old: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
