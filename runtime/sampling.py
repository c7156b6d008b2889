"""Choosing the next token from logits: greedy, temperature, top-k, top-p. NumPy only, deterministic by
seed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from dfssm.opset.numbers import require_real, require_whole

_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How to choose. The filters apply in this order, the one of Hugging Face's logits warpers."""

    temperature: float = 0.0  # 0 = greedy: the largest logit, the first of equals
    top_k: int = 0  # keep the k largest; 0 = all
    top_p: float = 1.0  # keep the smallest set of largest tokens whose probability reaches p; 1 = all
    seed: int | None = None  # None = another draw every time

    def __post_init__(self) -> None:
        require_real("temperature", self.temperature, 0, 1_000_000, "0 = greedy")
        require_whole("top_k", self.top_k, meaning="0 = all tokens")
        require_real("top_p", self.top_p, 1e-9, 1, "1 = all tokens")
        if self.seed is not None:
            require_whole("seed", self.seed)

    def choose(self, logits: np.ndarray, position: int) -> int:
        """The token after `position` others, from logits f32[V]. One whose logit is NaN or inf, where there is one.

        With a seed, the draw depends on the seed and the position alone: a text that is cut and continued is the same.
        """
        if self.count:
            tokens, logits = largest(logits, self.count)
            return int(tokens[self.choose_among(logits, position)])
        best = int(np.argmax(logits))  # argmax returns a NaN if there is one
        if not math.isfinite(logits[best]):
            return best
        tokens, weights = candidates(logits, self)
        return int(tokens[draw(weights, _uniform(self.seed, position))])

    @property
    def count(self) -> int:
        """How many of the largest logits decide: 1 of a greedy choice, 0 where all of them do."""
        return self.top_k if self.temperature else 1

    def choose_among(self, logits: np.ndarray, position: int) -> int:
        """`choose` from the `count` largest logits, f32[n] in falling order: the index of one."""
        if len(logits) == 1 or not math.isfinite(logits[0]):
            return 0
        weights = _weights(logits, self.temperature)
        kept = _nucleus(weights, self.top_p, weights.sum(dtype=np.float64))
        return draw(weights[:kept], _uniform(self.seed, position))


def _uniform(seed: int | None, position: int) -> float:
    """A number in [0, 1), of 53 random bits."""
    bits = os.urandom(8) if seed is None else blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(bits, "little") >> 11) * 2.0**-53


def draw(weights: np.ndarray, uniform: float) -> int:
    """The index at which the running sum of `weights` f32[n] passes `uniform` (in [0, 1)) of the whole.

    In two levels, since a running sum over 50,000 weights takes longer than all the rest of the choice. An
    index of weight 0 is never drawn.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    block = _passes(sums, target)
    inside = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    return int(starts[block]) + _passes(inside, target - (sums[block - 1] if block else 0.0))


def _passes(sums: np.ndarray, target: float) -> int:
    """First index whose running sum is above `target`, which rounding may have put at the last one."""
    return int(np.searchsorted(sums, min(target, np.nextafter(sums[-1], 0.0)), side="right"))


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that remain after the filters and their unnormalised probabilities.

    Args: logits f32[V], finite; `sampling.temperature` > 0.
    Returns: (tokens i64[n], weights f32[n]); in falling order of weight where a filter is on, else in token
    order. Equal logits rank by token, so that the same logits give the same set on every machine.
    """
    if sampling.top_k:
        tokens, logits = largest(logits, sampling.top_k)
        weights = _weights(logits, sampling.temperature)
        kept = _nucleus(weights, sampling.top_p, weights.sum(dtype=np.float64))
        return tokens[:kept], weights[:kept]
    weights = _weights(logits, sampling.temperature)
    if sampling.top_p == 1:
        return np.arange(len(weights)), weights
    # The nucleus of a language model is small against its vocabulary: sorting the few hundred largest is some
    # twenty times cheaper than sorting all. Their number grows until they hold the probability that is asked
    # for.
    total = weights.sum(dtype=np.float64)
    count = 256
    while True:
        tokens, _ = largest(logits, count)
        held = weights[tokens]
        if len(tokens) == len(weights) or held.sum(dtype=np.float64) >= sampling.top_p * total:
            kept = _nucleus(held, sampling.top_p, total)
            return tokens[:kept], held[:kept]
        count *= 8


def _weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    # Of a temperature below this, fp32 has no quotients; the draw is the greedy choice long before.
    weights: np.ndarray = np.exp((logits - logits.max()) / np.float32(max(temperature, 1e-20)))
    return weights


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of logits f32[V] in falling order, those of one value by token, NaN before all: tokens
    i64[n] and logits f32[n].
    """
    if count == 1:
        best = int(np.argmax(logits))  # a NaN, if there is one
        return np.array([best]), logits[best : best + 1].copy()
    number = ~np.isnan(logits)
    keys = np.where(number, -logits, -np.inf)
    chosen = np.arange(len(logits))
    if count < len(logits):
        chosen = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    order = np.lexsort((keys[chosen], number[chosen]))  # by the latter first; stable
    tokens = chosen[order[:count]]
    return tokens, logits[tokens]


def _nucleus(weights: np.ndarray, top_p: float, total: float) -> int:
    """How many of `weights`, in falling order, hold `top_p` of `total`, crossing token included."""
    if top_p == 1:
        return len(weights)
    before = np.cumsum(weights, dtype=np.float64) - weights
    return max(1, int(np.count_nonzero(before < top_p * total)))
