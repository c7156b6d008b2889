"""Where the time of a token goes: every op of a bundle beside the memory's limit.

The op library counts the time of its nodes while whole tokens are timed here: what is left of a token is spent outside
the kernels. ONNX Runtime's profiler, which slows a step down, only tells what the nodes read.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.files import temporary_folder
from dfssm.opset.ops import ALL_NAMES
from dfssm.runtime import Engine
from dfssm.runtime.ort import OrtBackend
from dfssm.runtime.state import State
from dfssm.targets import ort_cpu
from dfssm.targets.bundle import open_bundle
from dfssm.targets.cpu_library import CpuLibrary

from .bandwidth import Bandwidth, Probes
from .traffic import state_bytes

STEPS, ROUNDS, WARM = 16, 9, 4


def bench_ops(engine: Engine, probed: int) -> dict[str, Any]:
    """The keys `ops` of docs/json.md. `probed`: bytes that the probes of the memory pass over.

    DfssmError for a bundle that does not run our CPU kernels.
    """
    if engine.manifest.target != ort_cpu.NAME:
        raise DfssmError(f"--ops takes a bundle of target {ort_cpu.NAME}, this one is {engine.manifest.target}")
    nodes = _nodes(engine)
    library = CpuLibrary(ort_cpu.find_library())
    bandwidth = Bandwidth(probed, engine.threads)
    reads, writes = Probes(bandwidth.patterns), Probes(bandwidth.patterns)
    rounds: dict[str, list[float]] = defaultdict(list)
    state, token = engine.new_state(), np.zeros(1, np.int64)
    for _ in range(WARM):
        engine.advance(token, state)
    for _ in range(ROUNDS):
        before = bandwidth.read(), bandwidth.read_write()
        rounds["clock"].append(library.clock())
        engine.advance(token, state)  # what the probes put out of the caches
        library.time_ops(True)
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.advance(token, state)
        rounds["token"].append((time.perf_counter() - start) / STEPS)
        library.time_ops(False)
        for op in nodes:
            rounds[op].append(library.op_seconds(op) / STEPS)
        reads.add(before[0], bandwidth.read())
        writes.add(before[1], bandwidth.read_write())
    middle = np.argsort(rounds["token"])[ROUNDS // 2]  # of one round, so that the times add up
    took = {name: float(values[middle]) for name, values in rounds.items()}
    read, write = (float(np.median(probes.rates)) * 1e9 for probes in (reads, writes))
    cycles = took["clock"] * engine.threads
    return {
        "table": [
            _row(op, of, took[op], _states_of(op, state, engine.manifest.state_dtype), cycles, read, write)
            for op, of in nodes.items()
        ],
        "seconds": took["token"],
        "outside_share": 1 - sum(took[op] for op in nodes) / took["token"],
        "cycles_s": took["clock"],
    }


def _nodes(engine: Engine) -> dict[str, list[dict]]:
    """Op of ours -> what ONNX Runtime's profiler says of each of its nodes in a step."""
    with temporary_folder("a profile of ops") as folder:
        with open_bundle(engine.folder, hashes=False) as bundle:
            session = ort_cpu.open_profiled(bundle, engine.threads, f"{folder}/profile")
        profiled = Engine(engine.folder, engine.manifest, OrtBackend(session, ort_cpu.IN_PLACE), engine.threads)
        profiled.advance(np.zeros(1, np.int64), profiled.new_state())
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[dict]] = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time") and event["args"].get("op_name") in ALL_NAMES:
            found[event["args"]["op_name"]].append(event["args"])
    return found


def _states_of(op: str, state: State, state_dtype: str) -> tuple[float, float]:
    """Bytes of state that all nodes of the op read and write a token."""
    if not op.endswith("Step"):
        return 0.0, 0.0
    of_conv = op.endswith("Conv1dStep")
    tensors = {name: t for name, t in state.tensors.items() if name.startswith("conv_state") == of_conv}
    return state_bytes(tensors, state_dtype)


def _row(
    op: str,
    nodes: list[dict],
    took: float,
    states: tuple[float, float],
    cycles: float,
    read: float,
    write: float,
) -> dict[str, Any]:
    """A line of the table. `took`: seconds; `states`: bytes that are read and written; `read`, `write`: bytes a second
    of the memory.
    """
    parameters = sum(int(each["parameter_size"]) for each in nodes)
    held, written = states
    weights = sum(_weights(each["input_type_shape"]) for each in nodes)
    return {
        "op": op,
        "nodes": len(nodes),
        "seconds": took,
        "gb_s": (parameters + held + written) / took / 1e9,
        "weights_cycle": weights / took / cycles if weights else None,
        "floor_share": ((parameters + held - written) / read + 2 * written / write) / took,
    }


def _weights(inputs: list[dict[str, list[int]]]) -> int:
    """Number of weights in the largest matrix of bits or bytes among the inputs of a product; 0 for other ops."""
    packed = {"uint8": 8, "int8": 1}
    matrices = [(kind, shape) for each in inputs for kind, shape in each.items() if kind in packed and len(shape) == 2]
    return max((packed[kind] * math.prod(shape) for kind, shape in matrices), default=0)
