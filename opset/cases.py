"""The shared case table: one list of inputs drives the tests of every backend of every op.

A case names the sizes; `inputs()` draws the tensors from the case's own seed, so every backend sees the same numbers.
Sizes go past every tile edge (rows 16 and 32, columns 32, lanes 8 and 16): just under, at, just over.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arithmetic import Array
from .ops import ALL_OPS, DEFERRED_OPS, OPS


@dataclass(frozen=True)
class Case:
    """One set of inputs of one op; `attributes` are the node's, `sizes` what the tensors are drawn with."""

    op: str
    sizes: Mapping[str, Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "normal"

    @property
    def id(self) -> str:
        parts = [f"{k}{v}" for k, v in {**self.sizes, **self.attributes}.items()]
        return "-".join([self.op, *parts, *([] if self.kind == "normal" else [self.kind])])

    @property
    def state_dtype(self) -> str:
        return str(self.sizes.get("state", "float32"))

    def inputs(self) -> dict[str, Array]:
        """The op's inputs by name, absent optional ones left out. Columns that the op must not read are NaN."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        inputs = ALL_OPS[self.op].draw(rng, self.attributes, self.kind, **self.sizes)
        return {name: _in_wider(value, self.attributes.get(f"{name}_start", -1)) for name, value in inputs.items()}


def _in_wider(value: Array, start: int) -> Array:
    """`value` as the columns from `start` on of a wider tensor; none, one, two or three more follow."""
    if start < 0:
        return value
    edges = [(0, 0)] * (value.ndim - 1) + [(start, (start + 1) % 4)]
    return np.pad(value, edges, constant_values=np.nan)


CASES: list[Case] = [Case(op.name, *row) for op in OPS.values() for row in op.cases()]
"""Every case of every op that all targets have."""

DEFERRED_CASES: list[Case] = [Case(op.name, *row) for op in DEFERRED_OPS.values() for row in op.cases()]
"""Those of the ops of a deferred state."""


def cases(op: str) -> list[Case]:
    """The cases of one op."""
    return [case for case in CASES + DEFERRED_CASES if case.op == op]
