"""Where a curve over the layers changes: phases, how sure their boundaries are, and whether chance makes such, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PHASES = 3
"""As many as were published of a Mamba-2 of 48 layers: to categorise, to recall, to format."""


def boundaries(curve: Sequence[float] | np.ndarray, phases: int = PHASES) -> tuple[int, ...]:
    """The layers at which the phases after the first begin: stretches whose means fit the curve best (least squares).

    Found by dynamic programming over all cuts; of equal fits the earliest cuts. Fewer points than phases: each is one.
    """
    values = np.asarray(curve, float)
    count = len(values)
    phases = min(phases, count)
    sums, squares = (np.concatenate([[0.0], np.cumsum(v)]) for v in (values, values**2))

    def cost(start: int, end: int) -> float:
        total = sums[end] - sums[start]
        return max(squares[end] - squares[start] - total * total / (end - start), 0.0)

    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for cut in range(1, phases + 1):
        for end in range(cut, count + 1):
            ways = [
                (round(best[cut - 1, start][0] + cost(start, end), 12), (*best[cut - 1, start][1], start))
                for start in range(cut - 1, end)
                if (cut - 1, start) in best
            ]
            best[cut, end] = min(ways)
    return best[phases, count][1][1:]


def steps(curve: Sequence[float] | np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """Of each boundary, the mean of the phase after it minus that of the phase before."""
    values = np.asarray(curve, float)
    means = [part.mean() for part in np.split(values, list(cuts))]
    return np.diff(means)


@dataclass(frozen=True)
class Boundary:
    """A phase begins at `layer`; `low` to `high`: where 90 % of the bootstrapped curves have it. `step`: by how much
    the mean changes; `least`: by how much at least in 95 % of the bootstrapped curves. `chance`: the largest step of
    curves that mean nothing. `claimed`: even the least is larger than those.
    """

    layer: int
    low: int
    high: int
    step: float
    least: float
    chance: float

    @property
    def claimed(self) -> bool:
        return self.least > self.chance

    def __str__(self) -> str:
        interval = f" (90 %: {self.low} to {self.high})" if self.low < self.high else ""
        return f"layer {self.layer}{interval}"


def find_phases(
    curve: np.ndarray, bootstrapped: np.ndarray, shuffled: np.ndarray, random: np.ndarray, phases: int = PHASES
) -> list[Boundary]:
    """The boundaries of `curve` [L+1].

    `bootstrapped` [draws,L+1]; the nulls are `shuffled` [draws,L+1], of whose largest steps the 95th percentile counts,
    and that of a model with `random` weights [L+1].
    """
    cuts = boundaries(curve, phases)
    drawn = np.array([boundaries(one, phases) for one in bootstrapped])

    def largest(one: np.ndarray) -> float:
        return float(np.abs(steps(one, boundaries(one, phases))).max(initial=0.0))

    chance = max(float(np.quantile([largest(one) for one in shuffled], 0.95)), largest(random))
    found = []
    stepped = np.array([steps(one, cuts) for one in bootstrapped])
    for i, (cut, step) in enumerate(zip(cuts, steps(curve, cuts), strict=True)):
        low, high = np.quantile(drawn[:, i], [0.05, 0.95], method="nearest")
        least = float(np.quantile(np.sign(step) * stepped[:, i], 0.05))
        found.append(Boundary(cut, int(low), int(high), float(step), least, chance))
    return found


def described(found: Sequence[Boundary]) -> str:
    """The boundaries in a sentence or two."""
    claimed = [str(one) for one in found if one.claimed]
    rest = len(found) - len(claimed)
    parts = [f"Phases begin at {' and '.join(claimed)}."] if claimed else []
    if rest:
        parts.append(f"{rest} of {len(found)} boundaries are not claimed: chance makes such steps, too.")
    return " ".join(parts)
