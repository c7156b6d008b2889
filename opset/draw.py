"""What the inputs of cases are drawn with."""

from __future__ import annotations  # as in ops/: annotations name np.random, which takes 7 ms to import

from typing import Any

import numpy as np

from .arithmetic import F32, Array


def sizes(names: str, *rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """`sizes("B T", (1, 2), (3, 4))`: each row as sizes by name."""
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def activations(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    """Normal numbers, or the kinds that hurt quantisation: all zero, denormal, huge, exact ties of rounding."""
    x = rng.standard_normal(shape).astype(F32)
    if kind == "zero":
        x[:] = 0
    elif kind == "tiny":
        x *= F32(1e-32)  # below TINY: counts as zero
    elif kind == "huge":
        x *= F32(1e30)
    elif kind == "ties":  # max 127, so inv = 1 and every half is a tie
        x = (rng.integers(-253, 254, shape) / 2).astype(F32)
        x[..., 0] = 127
    return x


def int8(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-127, 128, shape, dtype=np.int8)
