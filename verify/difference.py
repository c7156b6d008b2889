"""How far one value of the bundle is from the student's, and whether that is too far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dfssm.model.config import DFSSMConfig
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.schema import STATE_FORMS
from dfssm.opset.tolerances import Tolerance, reduction

MANY = 16
"""Tokens of a run whose median over the tokens means something."""


class Difference:
    """The worst of what was added, as shares of the largest expected value; `tolerance` is what it may be.

    `typical` is for values in which an activation may fall on the other side of a rounding tie, which takes a wide
    tolerance. Such are rare: for each channel the median over the tokens, then the worst channel, is held to the noise
    of fp32 sums, so that one wrong row does not hide behind the wide tolerance.
    """

    def __init__(self, tolerance: Tolerance, typical: Tolerance | None = None):
        self.tolerance, self.typical = tolerance, typical
        self.max_abs = self.max_rel = 0.0
        self.typical_rel: float | None = None  # None: not enough tokens, or no axis of them

    def add(self, bundle: np.ndarray, student: np.ndarray) -> None:
        """Compare two arrays of one shape; with `typical` axis 1 is the tokens."""
        largest = float(np.abs(student).max()) or 1.0
        error = self.tolerance.error(bundle, student)  # infinite where a number is not finite
        self.max_abs = max(self.max_abs, error * largest)
        self.max_rel = max(self.max_rel, error)
        if self.typical and bundle.shape[1] >= MANY:
            worst = float(np.median(np.abs(bundle - student), axis=1).max()) / largest
            self.typical_rel = max(self.typical_rel or 0.0, worst if np.isfinite(worst) else float("inf"))

    @property
    def passed(self) -> bool:
        typical = self.typical is None or self.typical_rel is None or self.typical_rel <= self.typical.relative
        return self.max_rel <= self.tolerance.relative and typical

    def figures(self) -> dict[str, Any]:
        """`max_abs`, `max_rel` and `tolerance`."""
        return {"max_abs": self.max_abs, "max_rel": self.max_rel, "tolerance": self.tolerance.relative}


def widened(values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The value `name` as f32, an int8 state with its scales."""
    value = values[name].astype(np.float32)
    if values[name].dtype == np.int8:
        value *= values[name.replace("ssm_state", "ssm_scale")][..., None]
    return value


def tolerance_of_op(op: str, output: str, config: DFSSMConfig, state_dtype: str, tokens: int) -> Tolerance:
    """What an op of this model allows on equal inputs of so many tokens; `op` as `Tap` has it, or "logits"."""
    c = config
    if op in ("Embedding", "Residual"):
        return reduction(1)
    if op == "logits":
        return ALL_OPS["Int8MatMul"].tolerance({}, "y")
    rank, planes = (max(values) for values in zip(*c.scaffolds, strict=True))  # one bound for all layers
    sizes: dict[str, Any] = {"R": rank, "planes": planes, "W": c.d_conv, "N": c.d_state, "T": tokens}
    sizes |= {"state": STATE_FORMS[state_dtype], "C": c.d_inner if op == "GatedRMSNorm" else c.d_model}
    return ALL_OPS[op].tolerance(sizes, output)
