"""Many writers of one target: nobody fails, a reader sees one of the written contents whole, nothing is left behind.

python tests/tools/writers.py saves BUNDLE FOLDER [--threads 4] [--saves 500]
python tests/tools/writers.py namespaces MODEL FOLDER [--rounds 10]

`saves`: threads that save states of their own to one path in FOLDER, beside a reader. `namespaces`: two
`dfcompile --force` into one folder, each in a PID namespace of its own, where both are process 1 (takes root).
Each prints one JSON object, and ends with 1 where a writer failed, a content was torn or a file was left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np

from dfssm.runtime import Engine, State

ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def saves(engine: Engine, folder: Path, threads: int = 4, count: int = 500) -> dict[str, Any]:
    """`count` times `State.save` in each of `threads` threads, all to one path, while one thread loads it."""
    path, states = folder / "state", []
    for thread in range(threads):
        states.append(engine.new_state())
        engine.prefill(np.arange(1, 2 + thread)[None], states[-1])
    contents = {state.to_bytes() for state in states}
    failures: list[str] = []
    reads = torn = 0

    def write(state: State) -> None:
        for _ in range(count):
            try:
                state.save(path)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

    states[0].save(path)
    with ThreadPoolExecutor(threads) as pool:
        writers = [pool.submit(write, state) for state in states]
        while not all(writer.done() for writer in writers):
            reads += 1
            try:
                torn += engine.load_state(path).to_bytes() not in contents
            except Exception as error:
                failures.append(f"reader: {type(error).__name__}: {error}")
    left = sorted(entry.name for entry in folder.iterdir() if entry != path)
    return {
        "passed": not (failures or torn or left) and len(contents) == threads and reads > 0,
        "saves": threads * count,
        "failures": failures[:10],
        "reads": reads,
        "torn": torn,
        "left": left,
    }


def namespaces(model: str, folder: Path, rounds: int = 10) -> dict[str, Any]:
    """Two `dfcompile --force` of `model` at once, `rounds` times; after each round the bundle is loaded and runs."""
    bundle, failures = folder / "bundle", []
    dfcompile = Path(sys.executable).with_name("dfcompile")
    command = [*ALONE, dfcompile, model, "--target", "ort-cpu", "-o", bundle, "--force"]
    left: list[str] = []
    for _ in range(rounds):
        pair = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) for _ in range(2)]
        failures += [f"{one.returncode}: {error}" for one in pair if (error := one.communicate()[1]) or one.returncode]
        try:
            engine = Engine.load(bundle, threads=1)
            engine.step(np.array([1]), engine.new_state())
        except Exception as error:
            failures.append(f"reader: {type(error).__name__}: {error}")
        left += [entry.name for entry in folder.iterdir() if entry != bundle]
    return {"passed": not failures and not left, "rounds": rounds, "failures": failures[:10], "left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["saves", "namespaces"])
    parser.add_argument("source", help="a bundle for saves, a model for namespaces")
    parser.add_argument("folder", type=Path, help="made if absent; must be empty")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--saves", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if any(given.folder.iterdir()):
        parser.error(f"{given.folder} is not empty")
    if given.what == "saves":
        run = saves(Engine.load(given.source, threads=1), given.folder, given.threads, given.saves)
    else:
        run = namespaces(given.source, given.folder, given.rounds)
    print(json.dumps(run))
    sys.exit(not run["passed"])


if __name__ == "__main__":
    main()
