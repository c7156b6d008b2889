"""Long runs of one engine: many threads give what one gives, and the last of many steps takes what the first took.

python tests/tools/soak.py threads BUNDLE [--threads 8] [--generations 500]
python tests/tools/soak.py steps BUNDLE [--steps 100000]

Each prints one JSON object, and ends with 1 where texts differ, or memory has grown by a megabyte.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.runtime import Engine, Sampling

TOKENS = 24
GROWTH = 1 << 20


def by_generate(engine: Engine, seed: int) -> list[int]:
    """A text of its own for each seed: the prompt is drawn by it, its length too."""
    generation = engine.generate(_prompt(engine, seed), max_tokens=TOKENS, temperature=1.0, seed=seed, eos=())
    list(generation)
    return generation.tokens


def by_slots(engine: Engine, seed: int) -> list[int]:
    """The same text from a slot that shares its pool and its runs with another sequence."""
    slots, sampling = engine.slots(2), Sampling(1.0, seed=seed)
    other, slot = slots.join(), slots.join()
    prompt = _prompt(engine, seed)
    logits, tokens = slots.run([slot], [prompt])[0], []
    for position in range(len(prompt), len(prompt) + TOKENS):
        tokens.append(sampling.choose(logits, position))
        logits = slots.run([other, slot], [[position], tokens[-1:]])[1]
    return tokens


def threads(engine: Engine, count: int = 8, generations: int = 500) -> dict[str, Any]:
    """`generations` in each of `count` threads, half of them by slots, against one after the other."""
    jobs = [(by_slots if seed % 2 else by_generate, seed % generations) for seed in range(count * generations)]
    begin = time.perf_counter()
    expected = [by_generate(engine, seed) for seed in range(generations)]
    alone = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda job: job[0](engine, job[1]), jobs))
    wrong = sum(tokens != expected[seed] for tokens, (_, seed) in zip(found, jobs, strict=True))
    return {
        "passed": not wrong and len(set(map(tuple, expected))) > generations // 2,
        "threads": count,
        "generations": len(jobs),
        "wrong": wrong,
        "seconds": time.perf_counter() - alone,
        "alone_seconds": (alone - begin) * count,
    }


def steps(engine: Engine, count: int = 100_000, rounds: int = 50) -> dict[str, Any]:
    """`count` steps of one state. After each round anonymous memory, and the time of a step beside that of a state that
    has read nothing, which a busy machine slows down alike.
    """
    state, rng = engine.new_state(), np.random.default_rng(0)
    ratios: list[float] = []
    memory: list[int] = []
    for _ in range(rounds):
        ids = rng.integers(0, engine.vocab_size, (count // rounds, 1))
        pair, seconds = [state, engine.new_state()], [0.0, 0.0]
        for block in np.array_split(ids, max(1, len(ids) // 20)):  # in turns, for the machine changes its speed
            for used in (0, 1):
                begin = time.perf_counter()
                for token in block:
                    engine.step(token, pair[used])
                seconds[used] += time.perf_counter() - begin
        ratios.append(seconds[0] / seconds[1])
        memory.append(_anonymous())
    half = rounds // 2
    return {
        "passed": memory[-1] - memory[half] < GROWTH and bool(np.isfinite(state.logits).all()),
        "steps": int(state.tokens[0]),
        "step_us": seconds[0] / len(ids) * 1e6,
        "time_over_that_of_a_new_state": statistics.median(ratios[half:]),
        "grown_bytes": memory[-1] - memory[0],
        "grown_bytes_second_half": memory[-1] - memory[half],
    }


def _prompt(engine: Engine, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, engine.vocab_size, rng.integers(1, 20))


def _anonymous() -> int:
    """Resident memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["threads", "steps"])
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100_000)
    given = parser.parse_args()
    engine = Engine.load(given.bundle, threads=1)
    run = threads(engine, given.threads, given.generations) if given.what == "threads" else steps(engine, given.steps)
    print(json.dumps(run))
    sys.exit(not run["passed"])


if __name__ == "__main__":
    main()
