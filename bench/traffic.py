"""Bytes that a step moves at least, and the time that the memory takes for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dfssm.model.config import DFSSMConfig
from dfssm.model.ledger import weight_bytes_of_step
from dfssm.opset.schema import BLOCK, DEFERRED, SLOTS

from .bandwidth import Probes


def step_bytes(config: dict[str, Any], layout: int, state_dtype: str) -> dict[str, float]:
    """What a step moves at least, from a config by its JSON keys: `step_bytes` of docs/json.md."""
    of = DFSSMConfig.from_dict(config)
    states = of.states(state_dtype).items()
    # Arrays that take no memory: a config may say any size.
    arrays = {kind: np.broadcast_to(np.zeros((), dtype), (1, *shape)) for kind, (dtype, shape) in states}
    read, written = (of.n_layer * count for count in state_bytes(arrays, state_dtype))
    return {"weights": weight_bytes_of_step(config, layout), "state_read": read, "state_written": written}


def state_bytes(tensors: Mapping[str, np.ndarray], state_dtype: str) -> tuple[float, float]:
    """Bytes of the states `tensors`, by the names of the graph's inputs, that a token reads and writes, on average.

    A deferred state is read by every token and written by every BLOCKth; of its pending tokens and of the window of the
    convolution, rows of axis 1, a token writes one and reads those that count.
    """
    if not state_dtype.endswith(DEFERRED):
        whole = sum(tensor.nbytes for tensor in tensors.values())
        return whole, whole
    read = written = 0.0
    for name, tensor in tensors.items():
        rows = tensor.shape[1] if tensor.ndim > 1 else 1
        if name.startswith("ssm_"):
            shares = 1.0, 1 / BLOCK
        elif name.startswith("conv_state"):
            shares = (rows - SLOTS) / rows, 1 / rows
        elif rows == SLOTS:
            shares = (BLOCK + 1) / 2 / SLOTS, 1 / SLOTS  # 1 to BLOCK are pending
        else:
            shares = 1.0, 1.0  # their number
        read, written = read + shares[0] * tensor.nbytes, written + shares[1] * tensor.nbytes
    return read, written


def floor_seconds(weights: float, state: tuple[float, float], reads: Probes, writes: Probes) -> Any:
    """Seconds f64[rounds] of a step: what is written was read and is updated in place, all else is only read."""
    read, written = state
    return (weights + read - written) / (reads.rates * 1e9) + 2 * written / (writes.rates * 1e9)
