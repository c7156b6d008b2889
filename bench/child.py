"""One process that loads a bundle and decodes, as an application would. Its options come as one argument, JSON.

Prints a JSON object: load_seconds and the memory of the process. The benchmark runs it twice: for figures that a
process with other buffers would spoil, and with the scalar kernels, for the logits to compare with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dfssm.base.child import python
from dfssm.base.errors import DfssmError
from dfssm.runtime import Engine, State
from dfssm.runtime.machine import process_memory


def script(vocab_size: int, prompt: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The same tokens in every process: a prompt i64[prompt] and steps i64[steps]."""
    ids = np.random.default_rng(0).integers(0, vocab_size, prompt + steps)
    return ids[:prompt], ids[prompt:]


def follow_script(engine: Engine, state: State, prompt: int, steps: int) -> np.ndarray:
    """Logits f32[1+steps,V] after the prompt and after each step."""
    first, rest = script(engine.vocab_size, prompt, steps)
    return np.concatenate([engine.prefill(first, state), *(engine.step([token], state) for token in rest)])


def run_child(bundle: str | Path, threads: int, prompt: int, steps: int, logits: str = "", isa: str = "") -> dict:
    """Run this module in a new process and return what it prints. `isa` forces an instruction set."""
    options = {"bundle": str(bundle), "threads": threads, "prompt": prompt, "steps": steps, "logits": logits}
    environment = os.environ | ({"DFSSM_ISA": isa} if isa else {})
    command = python("-m", __name__, json.dumps(options))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DfssmError(f"a process that runs {bundle} ended with {done.returncode}: {last}")
    return json.loads(done.stdout)


def main(bundle: str, threads: int, prompt: int, steps: int, logits: str) -> None:
    start = time.perf_counter()
    engine = Engine.load(bundle, threads=threads)
    load_seconds = time.perf_counter() - start
    state = engine.new_state()
    if logits:
        np.save(logits, follow_script(engine, state, prompt, steps))
    else:  # as an application decodes: logits are used, not collected
        first, rest = script(engine.vocab_size, prompt, steps)
        engine.prefill(first, state)
        for token in rest:
            engine.step([token], state)
    memory = process_memory()  # while the state is there
    print(json.dumps({"load_seconds": load_seconds} | memory))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
