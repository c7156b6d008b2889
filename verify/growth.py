"""Whether states stored as fp16 stay within its range: a run that is long enough to see them grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dfssm.base import DfssmError
from dfssm.opset.schema import HALF_MAX

from .graph import Feeds, Infer, calls_of

TOKENS = 1024
CALL = 64  # tokens at a time, as the engine reads a prompt


def run_long(infer: Infer, states: Feeds, ids: np.ndarray, advance: Callable[[], None]) -> dict[str, Any]:
    """Read ids i64[1,T] from `states` on, in calls of CALL tokens. `advance` is called after each.

    Returns the entry `states` of the manifest's `verification`: the largest number in an SSM state after any call, its
    layer, and its share of fp16's range. Raises DfssmError naming the layer of which a state saturates.
    """
    largest, layer = 0.0, 0
    calls = [CALL] * (ids.shape[1] // CALL)
    for done, outputs in enumerate(calls_of(infer, states | {"logits_to_keep": np.array(1)}, ids, calls), 1):
        for name, state in outputs.items():
            if not name.startswith("ssm_state_out."):
                continue
            size, index = float(np.abs(state).max()), int(name.rpartition(".")[2])
            if not size < HALF_MAX:  # NaN is not, either
                raise DfssmError(
                    f"a state of layer {index} "
                    + (f"reaches {size:.0f}, where fp16 ends," if size == HALF_MAX else f"is {size}")
                    + f" within {done * CALL} random tokens: compile with --state-dtype fp32"
                )
            if size > largest:
                largest, layer = size, index
        advance()
    return {"tokens": ids.shape[1], "largest": largest, "layer": layer, "share": largest / HALF_MAX}
