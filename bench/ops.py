"""Where the time of a token goes: every op of a bundle, as ONNX Runtime's profiler sees it, beside the memory's limit.

Kernels are timed in a session that is profiled, what is left of a token in one that is not, in the same rounds: the
profiler makes a step slower. It slows kernels a little, too, so that what is left may come out below zero.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.opset.errors import DfssmError
from dfssm.opset.ops import ALL_NAMES
from dfssm.runtime import Engine
from dfssm.runtime.ort import OrtBackend
from dfssm.runtime.state import State
from dfssm.targets import ort_cpu
from dfssm.targets.bundle import open_bundle
from dfssm.targets.cpu_library import CpuLibrary

from .bandwidth import Bandwidth, Probes
from .traffic import state_bytes

STEPS, ROUNDS, WARM = 16, 9, 4  # the profiler keeps a million events: 350 a step


def bench_ops(engine: Engine, probed: int) -> dict[str, Any]:
    """The keys `ops` of docs/json.md. `probed`: bytes that the probes of the memory pass over.

    DfssmError for a bundle that does not run our CPU kernels.
    """
    if engine.manifest.target != ort_cpu.NAME:
        raise DfssmError(f"--ops takes a bundle of target {ort_cpu.NAME}, this one is {engine.manifest.target}")
    library = CpuLibrary(ort_cpu.find_library())
    bandwidth = Bandwidth(probed, engine.threads)
    reads, writes = Probes(bandwidth.patterns), Probes(bandwidth.patterns)
    whole, clocks = [], []
    with tempfile.TemporaryDirectory(prefix="dfssm-ops-") as folder:
        with open_bundle(engine.folder, hashes=False) as bundle:
            session = ort_cpu.open_profiled(bundle, engine.threads, f"{folder}/profile")
        profiled = Engine(engine.folder, engine.manifest, OrtBackend(session, ort_cpu.IN_PLACE), engine.threads)
        token = np.zeros(1, np.int64)
        states = [(each, each.new_state()) for each in (engine, profiled)]
        for each, state in states:
            for _ in range(WARM):
                each.advance(token, state)
        for _ in range(ROUNDS):
            before = bandwidth.read(), bandwidth.read_write()
            clocks.append(library.clock())
            for each, state in states:
                start = time.perf_counter()
                for _ in range(STEPS):
                    each.advance(token, state)
                if each is engine:
                    whole.append((time.perf_counter() - start) / STEPS)
            reads.add(before[0], bandwidth.read())
            writes.add(before[1], bandwidth.read_write())
        events = json.loads(Path(session.end_profiling()).read_text())
    seconds, cycles = float(np.median(whole)), float(np.median(clocks)) * engine.threads
    read, write = (float(np.median(probes.rates)) * 1e9 for probes in (reads, writes))
    table = [
        _row(op, nodes, _states_of(op, states[0][1], engine.manifest.state_dtype), cycles, read, write)
        for op, nodes in _by_op(events).items()
    ]
    ours = sum(row["seconds"] for row in table)
    return {
        "table": table,
        "seconds": seconds,
        "outside_share": 1 - ours / seconds,
        "cycles_s": cycles / engine.threads,
    }


def _by_op(events: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Op of ours -> node -> its events, one a step."""
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        name, op = event["name"], event.get("args", {}).get("op_name")
        if name.endswith("_kernel_time") and op in ALL_NAMES:
            found[op][name].append(event)
    return found


def _states_of(op: str, state: State, state_dtype: str) -> tuple[float, float]:
    """Bytes of state that all nodes of the op read and write a token."""
    if not op.endswith("Step"):
        return 0.0, 0.0
    of_conv = op.endswith("Conv1dStep")
    tensors = {name: t for name, t in state.tensors.items() if name.startswith("conv_state") == of_conv}
    return state_bytes(tensors, state_dtype)


def _row(
    op: str, nodes: dict[str, list[dict]], states: tuple[float, float], cycles: float, read: float, write: float
) -> dict[str, Any]:
    """A line of the table. `states`: bytes that are read and written; `read`, `write`: bytes a second of the memory."""
    took = 1e-6 * float(np.median(sum(np.array([event["dur"] for event in of[WARM:]]) for of in nodes.values())))
    shapes = [of[0]["args"] for of in nodes.values()]
    parameters = sum(int(each["parameter_size"]) for each in shapes)
    held, written = states
    weights = sum(_weights(each["input_type_shape"]) for each in shapes)
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
