"""One process that loads a bundle and decodes, as an application would: `python -m dfssm.bench.child BUNDLE`.

Prints a JSON object: load_seconds, the memory of the process, and the logits' file if one was asked for. The
benchmark runs it twice: for figures that a process with other buffers would spoil, and with the scalar
kernels as the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dfssm.opset.errors import DfssmError
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
    command = [sys.executable, "-m", __name__, str(bundle), f"--threads={threads}", f"--prompt={prompt}"]
    command += [f"--steps={steps}", f"--logits={logits}"]
    environment = os.environ | ({"DFSSM_ISA": isa} if isa else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise DfssmError(f"a process that runs {bundle} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--logits", default="")
    options = parser.parse_args()
    start = time.perf_counter()
    engine = Engine.load(options.bundle, threads=options.threads)
    load_seconds = time.perf_counter() - start
    state = engine.new_state()
    if options.logits:
        np.save(options.logits, follow_script(engine, state, options.prompt, options.steps))
    else:  # as an application decodes: logits are used, not collected
        first, rest = script(engine.vocab_size, options.prompt, options.steps)
        engine.prefill(first, state)
        for token in rest:
            engine.step([token], state)
    memory = process_memory()  # while the state is there
    print(json.dumps({"load_seconds": load_seconds} | memory))


if __name__ == "__main__":
    main()
