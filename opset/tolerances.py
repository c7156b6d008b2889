"""How far two backends may be apart, and why. Integer parts have no tolerance: they are exact.

Two backends add the same fp32 numbers in different orders. The error of a sum of n terms in another order is at most
n * eps * sum|terms|, and grows like sqrt(n) * eps * sqrt(sum terms^2) in practice; we allow `SLACK` times the latter.
"""

from dataclasses import dataclass

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)
EPS16 = float(np.finfo(np.float16).eps)

SLACK = 8.0
"""Head-room over the random-walk estimate: backends also differ in exp, log1p, sqrt and division (1-4 ulp each)."""


@dataclass(frozen=True)
class Tolerance:
    """|a - b| <= relative * (largest |b| of the tensor); `reason` is printed when a comparison fails."""

    relative: float
    reason: str

    def error(self, actual: np.ndarray, expected: np.ndarray) -> float:
        """Largest |actual - expected| as a share of the largest |expected| (of 1 where all are zero)."""
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        if not expected.size:
            return 0.0
        worst = float(np.abs(actual - expected).max())
        return worst / (float(np.abs(expected).max()) or 1.0) if np.isfinite(worst) else float("inf")

    def check(self, actual: np.ndarray, expected: np.ndarray, name: str = "output") -> None:
        """AssertionError naming `name`, the error, the bound and its reason when `actual` is too far off."""
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
        error = self.error(actual, expected)
        assert error <= self.relative, f"{name}: relative error {error:.3g} > {self.relative:.3g} ({self.reason})"


def reduction(terms: int) -> Tolerance:
    """fp32 sum of `terms` products, in any order."""
    return Tolerance(SLACK * EPS32 * max(terms, 1) ** 0.5, f"fp32 sum of {terms} terms in another order")


def op_tolerance(op: str, sizes: dict, output: str = "y") -> Tolerance:
    """Tolerance of one op on equal inputs. `sizes` are the symbols of the schema (T, K, R, N, C, ... as bound)."""
    if op == "BinaryScaffoldMatMul":  # integers exact; the rank-R product and the planes are fp32 sums
        return reduction(sizes["R"] + 2 * sizes.get("planes", 1))
    if op == "Int8MatMul":
        return reduction(1)  # one exact integer, two fp32 products
    if op == "CausalConv1dStep":
        return reduction(sizes["W"] + 1)
    if op in ("RMSNorm", "GatedRMSNorm"):
        return reduction(sizes["C"])
    if op == "SelectiveScanStep":
        if output.startswith("new_state"):
            dtype = sizes.get("state", "float32")
            # int8: a last-bit difference of fp32 may move a value across a rounding tie, one step of the row's scale
            step = {"float32": 0.0, "float16": EPS16, "int8": 1 / 127}[dtype]
            return Tolerance(step + reduction(sizes["T"]).relative, f"{dtype} state, one rounding step apart")
        return reduction(sizes["N"] + sizes["T"])
    raise KeyError(op)


def model_tolerance(n_layer: int, d_model: int) -> Tolerance:
    """Logits of a whole model between two backends, teacher-forced, as a share of the largest |logit|.

    The float noise between backends (1e-6) is not what bounds this: now and then it moves an activation across a
    rounding tie of the int8 quantisation, q changes by 1, and an output of that product by 2 scale s. Against an
    output of |q| ~ 127/4 rms that is 2 / (32 sqrt(d_model)) of the layer's output a flip. A flip comes with
    probability 127 * noise per activation, so a few a layer and token; they add up like a random walk over layers.
    Allowed: the four-sigma sum of two flips in each of the 2 n_layer + 1 products.

    For shallow models and single layers only. Through many layers flips breed flips: two correct backends of a random
    1.3B (48 layers) had logits 6-12 % apart, and the student disturbed by 1e-7 was 16 % off itself. So dfcompile and
    `dfssm compare` hold deep models to their ops and layers on equal inputs (compiler/verify.py, bench/comparison.py).
    """
    flip = 2 / (32 * d_model**0.5)
    walk = 4 * (2 * (2 * n_layer + 1)) ** 0.5
    return Tolerance(flip * walk, "activations on a rounding tie of int8 move by one step between backends")
