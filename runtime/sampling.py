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
        best = int(np.argmax(logits))  # argmax returns a NaN if there is one
        if self.temperature == 0 or not math.isfinite(logits[best]):
            return best
        tokens, weights = candidates(logits, self, logits[best])
        return int(tokens[draw(weights, _uniform(self.seed, position))])


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


def candidates(logits: np.ndarray, sampling: Sampling, largest: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that remain after the filters and their unnormalised probabilities.

    Args: logits f32[V], and the `largest` of them; `sampling.temperature` > 0.
    Returns: (tokens i64[n], weights f32[n]); in falling order of weight where a filter is on, else in token
    order. Equal logits rank by token, so that the same logits give the same set on every machine.
    """
    # Of a temperature below this, fp32 has no quotients; the draw is the greedy choice long before.
    weights = np.exp((logits - largest) / np.float32(max(sampling.temperature, 1e-20)))
    if not sampling.top_k and sampling.top_p == 1:
        return np.arange(len(weights)), weights
    if sampling.top_k:
        tokens = _largest(logits, sampling.top_k)
        return _nucleus(tokens, weights[tokens], sampling.top_p, weights[tokens].sum(dtype=np.float64))
    # The nucleus of a language model is small against its vocabulary: sorting the few hundred largest is some
    # twenty times cheaper than sorting all. Their number grows until they hold the probability that is asked
    # for.
    total = weights.sum(dtype=np.float64)
    count = 256
    while True:
        tokens = _largest(logits, count)
        held = weights[tokens]
        if len(tokens) == len(weights) or held.sum(dtype=np.float64) >= sampling.top_p * total:
            return _nucleus(tokens, held, sampling.top_p, total)
        count *= 8


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest in falling order, lower index first among equals."""
    if count < len(logits):
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        chosen = np.flatnonzero(logits >= least)
    else:
        chosen = np.arange(len(logits))
    order = np.argsort(-logits[chosen], kind="stable")
    return chosen[order[:count]]


def _nucleus(tokens: np.ndarray, weights: np.ndarray, top_p: float, total: float) -> tuple[np.ndarray, np.ndarray]:
    """The shortest front of (tokens, weights) that holds `top_p` of `total`, crossing token included."""
    if top_p == 1:
        return tokens, weights
    before = np.cumsum(weights, dtype=np.float64) - weights
    keep = max(1, int(np.count_nonzero(before < top_p * total)))
    return tokens[:keep], weights[:keep]
