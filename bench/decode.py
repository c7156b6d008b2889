"""How fast a bundle decodes, beside what the memory would allow, measured in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import numpy as np

from dfssm.base.child import python
from dfssm.base.errors import DfssmError
from dfssm.base.files import temporary_folder
from dfssm.model.ledger import bundle_bytes, weight_bytes_of_step
from dfssm.runtime import Engine
from dfssm.runtime.machine import instruction_sets, machine, packages
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import get_target

from .bandwidth import Bandwidth, Probes
from .child import follow_script, run_child
from .device import BATCHES, CopyBandwidth, bench_batches, first_gpu
from .ops import bench_ops
from .peer import Peer
from .peers import open_peer
from .series import tokens_a_second
from .speculation import bench_speculation
from .traffic import floor_seconds, step_bytes

# Prompt and steps of the check: enough for the kernels of a prompt and those of a step, and for a state to
# matter; the scalar kernels take seconds a token at 1.3B.
CHECKED = (3, 1)

# Root mean square of the logits' difference as a share of the logits'. Two correct sets of kernels may differ
# by some 15 % after 48 layers of a random model: float noise moves an activation across a tie of the int8
# rounding, and that moves others. Logits that have nothing to do with each other differ by 140 %. Single
# kernels are held to 1e-6 elsewhere (the tests, `dfssm compare`): this check is for a build or a machine on
# which one of them is broken.
WRONG = 0.5

# Seconds between two things that are timed: worker threads of the one before wait spinning, for up to 50 ms.
REST = 0.1

Progress = Callable[[int, int], None]


def bench(
    bundle: str | Path,
    threads: int = 0,
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 7,
    peers: tuple[str, ...] = (),
    speculate: bool = False,
    batches: tuple[int, ...] = (),
    ops: bool = False,
    busy: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict:
    """Measure `bundle`; the result is that of docs/json.md, docs/bench.md says how to read it.

    Each of `rounds` rounds probes the memory, reads a prompt of `prompt` tokens, decodes `tokens` tokens, first alone
    and then in each of `batches`, and lets each peer do what batch 1 does; on a GPU, batches follow. `ops`: where the
    time of a token goes. `speculate`: speculation in rounds of its own. `busy`: so many other processes each keep a
    core busy meanwhile. Raises DfssmError when the outputs are not right: a wrong kernel's speed means nothing.
    """
    engine = Engine.load(bundle, threads=threads)
    if speculate:
        engine.ahead(engine.new_state())  # refused before anything is timed
    bundle_bytes(engine.folder, engine.manifest)  # or as much memory would be probed as its config says
    check = check_outputs(bundle, engine)
    process = run_child(bundle, engine.threads, prompt, tokens)
    with ExitStack() as stack:
        beside: dict[str, Peer] = {}
        for peer in peers:
            folder = stack.enter_context(temporary_folder(f"the peer {peer}"))
            beside |= open_peer(peer, engine.config, folder, engine.threads)
        for each in beside.values():
            stack.callback(each.close)
        for _ in range(busy):
            stack.callback(Popen(python("-c", "while True: pass")).kill)
        series, reads, writes = _run_rounds(engine, beside, batches, prompt, tokens, rounds, progress)
    backend = engine.backend
    moved = step_bytes(engine.config, engine.manifest.layout, engine.manifest.state_dtype)
    weights, read, written = moved.values()

    def floor(batch: int = 1) -> np.ndarray:
        """Tokens a second, f64[rounds]."""
        return batch / floor_seconds(weights, (batch * read, batch * written), reads, writes)

    gpu, batched = None, []
    if isinstance(backend, TensorRTBackend):
        gpu = {"name": first_gpu()} | {key: engine.manifest.engine[key] for key in ("builder", "version", "lowering")}
        batched = bench_batches(engine, backend, batches or BATCHES, tokens, rounds, progress)
    else:
        for batch in batches:
            found = series[f"batch {batch}"]
            batched.append({"batch": batch, **tokens_a_second(found), **_beside_floor(found, floor(batch))})
    rates = tokens_a_second(series["tok_s"])
    return {
        **rates,
        "gb_s": rates["tok_s"] * sum(moved.values()) / 1e9,
        **_beside_floor(series["tok_s"], floor()),
        "read_gb_s": float(np.median(reads.rates)),
        "read_pattern": reads.pattern,
        "read_write_gb_s": float(np.median(writes.rates)),
        "read_write_pattern": writes.pattern,
        "step_bytes": moved,
        **tokens_a_second(series["prefill"], "prefill_"),
        "peers": {
            name: {
                **tokens_a_second(series[name]),
                "ratio": float(np.median(series["tok_s"] / series[name])),
                **tokens_a_second(series[f"{name} prefill"], "prefill_"),
                "prefill_ratio": float(np.median(series["prefill"] / series[f"{name} prefill"])),
                "options": peer.options,
            }
            for name, peer in beside.items()
        },
        "gpu": gpu,
        "speculation": bench_speculation(engine, prompt, tokens, rounds, progress) if speculate else None,
        "batches": batched,
        "ops": bench_ops(engine, int(weights)) if ops else None,
        "threads": engine.threads,
        "state_dtype": engine.manifest.state_dtype,
        "target": engine.manifest.target,
        "isa": _isa(engine),
        "prompt": prompt,
        "prompt_calls": -(-prompt // backend.max_tokens),
        "tokens": tokens,
        "rounds": rounds,
        "busy": busy,
        "check": check,
        **process,
        "machine": machine() | {"isas": instruction_sets(), "packages": packages()},
    }


def check_outputs(bundle: str | Path, engine: Engine) -> dict:
    """Compare the engine's logits on a few tokens with those of the scalar kernels, run in a new process.

    A bundle of a target without such kernels is compared with itself read token by token.
    Raises DfssmError when they have little to do with each other.
    """
    prompt, steps = CHECKED
    actual = follow_script(engine, engine.new_state(), prompt, steps)
    with temporary_folder("a comparison of logits") as folder:
        file = str(folder / "logits.npy")
        if _isa(engine):
            reference = "scalar kernels"
            run_child(bundle, engine.threads, prompt, steps, logits=file, isa="scalar")
        else:
            reference = "token by token"
            run_child(bundle, engine.threads, 1, prompt + steps - 1, logits=file)
        expected = np.load(file)[-len(actual) :]
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    if not error <= WRONG:
        raise DfssmError(
            f"{bundle} computes wrong logits: off by {100 * error:.0f} % (rms) against {reference}; "
            "not timed, look at `dfssm compare`"
        )
    return {"reference": reference, "rms_rel": error, "allowed": WRONG}


def _beside_floor(rates: np.ndarray, floor: np.ndarray) -> dict:
    return {"floor_tok_s": float(np.median(floor)), "floor_share": float(np.median(rates / floor))}


def _run_rounds(
    engine: Engine,
    peers: dict[str, Peer],
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    rounds: int,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], Probes, Probes]:
    """Name -> tokens a second, f64[rounds]; the probes of reading, and of reading and writing, around each round."""
    size, backend = weight_bytes_of_step(engine.config, engine.manifest.layout), engine.backend
    # Of the memory that the bundle runs from.
    bandwidth: Bandwidth | CopyBandwidth
    if isinstance(backend, TensorRTBackend):
        bandwidth = CopyBandwidth(backend.cuda, size)
    else:
        bandwidth = Bandwidth(size, engine.threads)
    reads, writes = Probes(bandwidth.patterns), Probes(bandwidth.patterns)
    ids = np.random.default_rng(1).integers(0, engine.vocab_size, prompt)
    state = engine.new_state()
    series: dict[str, list[float]] = {}

    def record(name: str, value: float) -> None:
        series.setdefault(name, []).append(value)

    # On a GPU they have rounds of their own.
    states = {} if isinstance(backend, TensorRTBackend) else {batch: engine.new_state(batch) for batch in batches}

    engine.prefill(ids, state)
    for each in (state, *states.values()):
        _decode(engine, each, 4)  # warm: pages, threads, clocks
    for index in range(rounds):
        time.sleep(REST)
        before = bandwidth.read(), bandwidth.read_write()
        state.reset()
        start = time.perf_counter()
        engine.prefill(ids, state)
        record("prefill", prompt / (time.perf_counter() - start))
        record("tok_s", tokens / _decode(engine, state, tokens))
        for batch, many in states.items():
            record(f"batch {batch}", batch * tokens / _decode(engine, many, tokens))
        time.sleep(REST)
        reads.add(before[0], bandwidth.read())
        writes.add(before[1], bandwidth.read_write())
        for name, peer in peers.items():
            time.sleep(REST)
            peer.decode(2)
            record(name, tokens / peer.decode(tokens))
            record(f"{name} prefill", prompt / peer.prefill(prompt))
        progress(index + 1, rounds)
    bandwidth.close()
    return {name: np.array(values) for name, values in series.items()}, reads, writes


def _isa(engine: Engine) -> str | None:
    """The instruction set of our kernels that run the bundle; None where it runs in others."""
    return get_target(engine.manifest.target).probe().uses.get("isa")


def _decode(engine: Engine, state, tokens: int) -> float:
    """Seconds of `tokens` greedy steps, choice of the tokens included."""
    start = time.perf_counter()
    for _ in range(tokens):
        engine.advance(state.logits.argmax(1), state)
    return time.perf_counter() - start
