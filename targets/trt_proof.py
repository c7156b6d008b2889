"""What can be told of an engine without a GPU: that the weights of the graph lie in it, whole and unchanged."""

import mmap
from pathlib import Path

import onnx_graphsurgeon as gs

from .trt_lowering.graph import load, raw_bytes

LEAST = 512
"""Smaller tensors are not looked for: their bytes may be somewhere in a large file by chance, or folded away."""


def weights_in(graph: Path, engine: Path) -> tuple[int, list[str]]:
    """The weights in `graph` of LEAST bytes or more: how many are in `engine`, byte for byte, and the others."""
    count, missing = 0, []
    with open(engine, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        for tensor in load(graph).tensors().values():
            if isinstance(tensor, gs.Constant) and len(data := raw_bytes(tensor)) >= LEAST:
                if plan.find(data) < 0:
                    missing.append(tensor.name)
                else:
                    count += 1
    return count, missing
