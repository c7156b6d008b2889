"""Two installations of dfssm and one model: whether all bits of what their bundles compute are equal.

    python tests/tools/same_bits.py OLD_PYTHON NEW_PYTHON MODEL... [--isa NAME]... [--old OPTIONS] [--new OPTIONS]

Each compiles every model for every dtype of the state. On every instruction set both read a prompt in one call, then
tokens one by one. Compared are all logits, the last state and the weights file. OPTIONS are further ones of dfcompile:
`--new="--isa avx512vnni"` where the old version knows only that layout. Prints a line a case; ends with 1 where bits
differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import hashlib, sys
import numpy as np
from dfssm.runtime import Engine

engine = Engine.load(sys.argv[1], threads=1)
state, logits, states = engine.new_state(), hashlib.sha256(), hashlib.sha256()
ids = np.random.default_rng(1).integers(0, engine.vocab_size, 42)
logits.update(engine.prefill(ids[None, :37], state).tobytes())
for token in ids[37:]:
    logits.update(engine.step(token[None], state).tobytes())
for name in sorted(state.tensors):
    states.update(np.ascontiguousarray(state.tensors[name]).tobytes())
print(logits.hexdigest(), states.hexdigest())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old_python", type=Path)
    parser.add_argument("new_python", type=Path)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--isa", action="append", help="repeatable; default: scalar and avx2")
    for name in ("old", "new"):
        parser.add_argument(f"--{name}", default="", metavar="OPTIONS", help=f"of the {name} dfcompile")
    given = parser.parse_args()
    sides = [(given.old_python, given.old.split()), (given.new_python, given.new.split())]

    same = True
    for model in given.models:
        for dtype in ("fp32", "fp16", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                bundles = [Path(folder) / name for name in ("old", "new")]
                for (python, options), bundle in zip(sides, bundles, strict=True):
                    command = [python.with_name("dfcompile"), model, "--target", "ort-cpu", "--state-dtype", dtype]
                    _run([*command, "--no-verify", "-o", bundle, *options])
                digests = {"weights file": [_weights(bundle) for bundle in bundles]}
                for isa in given.isa or ["scalar", "avx2"]:
                    found = [
                        _run([python, "-c", RUN, bundle], DFSSM_ISA=isa).split()
                        for (python, _), bundle in zip(sides, bundles, strict=True)
                    ]
                    digests |= {f"logits, {isa}": [each[0] for each in found]}
                    digests |= {f"state, {isa}": [each[1] for each in found]}
            for what, (old, new) in digests.items():
                print(f"{model}, {dtype}: {what}: {'equal' if old == new else 'DIFFERENT'}", flush=True)
                same &= old == new
    sys.exit(not same)


def _weights(bundle: Path) -> str:
    (file,) = bundle.glob("*.data")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _run(command: list, **environment: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment).stdout


if __name__ == "__main__":
    main()
