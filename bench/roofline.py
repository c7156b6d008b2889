"""Runs under the roof that the memory sets: operations a second over operations a byte (Williams, Waterman, Patterson:
Roofline, 2009).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Point(NamedTuple):
    """A run: operations for each byte that it moves at least, and operations a second."""

    name: str
    intensity: float
    rate: float


def roofline(result: dict[str, Any], operations: int) -> tuple[float, list[Point]]:
    """The memory's bytes a second, and the runs that `result`, of `decode.bench`, measured.

    `operations`: of one token. The bytes a second are those that the limit of decode stands for.
    """
    moved = result["step_bytes"]
    weights, states = moved["weights"], moved["state_read"] + moved["state_written"]
    prompt, calls = result["prompt"], result["prompt_calls"]
    runs = [("decode", 1, weights + states, result["tok_s"])]
    runs += [(f"batch {b['batch']}", b["batch"], weights + b["batch"] * states, b["tok_s"]) for b in result["batches"]]
    runs.append((f"prompt of {prompt}", prompt, calls * (weights + states), result["prefill_tok_s"]))
    points = [Point(name, tokens * operations / size, operations * rate) for name, tokens, size, rate in runs]
    return (weights + states) * result["floor_tok_s"], points
