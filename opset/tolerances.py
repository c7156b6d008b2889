"""How far two backends may be apart, and why. Integer parts have no tolerance: they are exact.

Two backends add the same fp32 numbers in different orders. The error of a sum of n terms in another order is at most
n * eps * sum|terms|, and grows like sqrt(n) * eps * sqrt(sum terms^2) in practice; we allow `SLACK` times the latter.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

EPS32 = 2.0**-23
EPS16 = 2.0**-10

SLACK = 8.0
"""Head-room over the random-walk estimate: backends also differ in exp, log1p, sqrt and division (1-4 ulp each)."""


@dataclass(frozen=True)
class Tolerance:
    """|a - b| <= relative * (largest |b| of the tensor); `reason` is printed when a comparison fails."""

    relative: float
    reason: str

    def error(self, actual: ArrayLike, expected: ArrayLike) -> float:
        """Largest |actual - expected| as a share of the largest |expected| (of 1 where all are zero)."""
        got, wanted = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        if not wanted.size:
            return 0.0
        worst = float(np.abs(got - wanted).max())
        return worst / (float(np.abs(wanted).max()) or 1.0) if np.isfinite(worst) else float("inf")

    def check(self, actual: ArrayLike, expected: ArrayLike, name: str = "output") -> None:
        """AssertionError naming `name`, the error, the bound and its reason when `actual` is too far off."""
        got, wanted = np.shape(actual), np.shape(expected)
        assert got == wanted, f"{name}: shape {got}, expected {wanted}"
        error = self.error(actual, expected)
        assert error <= self.relative, f"{name}: relative error {error:.3g} > {self.relative:.3g} ({self.reason})"


def reduction(terms: int) -> Tolerance:
    """fp32 sum of `terms` products, in any order."""
    return Tolerance(SLACK * EPS32 * max(terms, 1) ** 0.5, f"fp32 sum of {terms} terms in another order")


def fp16_pairs(terms: int, depth: int = 1) -> Tolerance:
    """fp32 sum of `terms` products on fp16 tensor cores, each factor hi + lo of two fp16.

    A pair has 22 bits, so a factor is off by 2^-22 of itself, and the product lo lo that is left out is as small: 3
    2^-22 a product, times `depth` where a factor is such a sum itself. A number far below the largest of its matrix
    loses more of itself, but no more than 2^-39 of that one. Tensor cores cut sums where fp32 rounds them, at 2^-23 of
    the largest term: `SLACK` has room for it.
    """
    product = 3 * 2.0**-22
    return Tolerance(depth * product + reduction(terms).relative, f"fp32 sum of {terms} products of fp16 pairs")


SPREAD = 4.0
"""Over the drift of one disturbed run: another backend's noise has other places and sizes. Seen for digests between the
CPU's instruction sets: up to 2.1 times (demo, random 130M and 1.3B)."""

UNRELATED = 0.9
"""As `rms_error` the most that means anything: zeros are off by 1, other values of the same size by 1.4. A random 1.3B
comes near it: between instruction sets a state of layer 45 was off by 0.5."""


def rms_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """Root mean square of the difference as a share of that of `expected` (of 1 where all are zero)."""
    got, wanted = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = float(np.linalg.norm(got - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)
    return error if np.isfinite(error) else float("inf")


def drift_tolerance(layers: int, d_model: int, drift: float) -> Tolerance:
    """What is computed by the first `layers` layers of a run of its own, between two backends, as `rms_error`.

    `drift`: how far it moved when the verified graph ran with float noise at each layer. In shallow models that may be
    nothing by luck, a single flipped activation being rare: then `model_tolerance` holds.
    """
    flips = model_tolerance(layers, d_model)
    if flips.relative >= SPREAD * drift:
        return flips
    return Tolerance(min(SPREAD * drift, UNRELATED), f"{SPREAD:.0f} times what float noise moves in this model")


def half_tolerance(n_layer: int) -> Tolerance:
    """Logits of a whole model whose activations are stored as fp16, a share of the largest, besides `model_tolerance`.

    Rounding moves an activation by up to 2^-11 of itself, 0.06 steps of its int8 code where that is 127: on average one
    code in 30 changes by 1. Of |q| ~ 127/4 rms that is sqrt(1/30) / 32 of a product's output. Allowed: four sigma of a
    random walk over the 2 n_layer + 1 products; as there, for shallow models only.
    """
    return Tolerance(4 * (2 * n_layer + 1) ** 0.5 * 30**-0.5 / 32, "activations rounded to fp16 change codes of int8")


def model_tolerance(n_layer: int, d_model: int) -> Tolerance:
    """Logits of a whole model between two backends, teacher-forced, as a share of the largest |logit|.

    The float noise between backends (1e-6) is not what bounds this: now and then it moves an activation across a
    rounding tie of the int8 quantisation, q changes by 1, and an output of that product by 2 scale s. Against an
    output of |q| ~ 127/4 rms that is 2 / (32 sqrt(d_model)) of the layer's output a flip. A flip comes with
    probability 127 * noise per activation, so a few a layer and token; they add up like a random walk over layers.
    Allowed: the four-sigma sum of two flips in each of the 2 n_layer + 1 products.

    For shallow models and single layers only. Through many layers flips breed flips: two correct backends of a random
    1.3B (48 layers) had logits 6-12 % apart, and the student disturbed by 1e-7 was 16 % off itself. So dfcompile and
    `dfssm compare` hold deep models to their ops and layers on equal inputs (verify/).
    """
    flip = 2 / (32 * d_model**0.5)
    walk = 4 * (2 * (2 * n_layer + 1)) ** 0.5
    return Tolerance(flip * walk, "activations on a rounding tie of int8 move by one step between backends")
