"""Choosing the next token from logits: what changes them, the filters, the draw. NumPy only, deterministic by seed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.numbers import require_real, require_whole

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""processor(ids i64[T], logits f32[V]) -> logits f32[V], perhaps the same array: `ids` is the text so far, with its
prompt."""


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token of a text.

    Logits are changed first, in this order: repetition penalty, frequency and presence penalty, logit bias, processors.
    Then the filters apply, in the order of Hugging Face's logits warpers: temperature, top-k, top-p, min-p. What needs
    the text so far, penalties and processors, takes a `Sampler`.

    Attributes:
        temperature: 0 = greedy, the largest logit, the first of equals.
        top_k: keep the k largest; 0 = all.
        top_p: keep the smallest set of largest tokens whose probability reaches p; 1 = all.
        seed: None = another draw every time.
        min_p: keep the tokens that are at least p times as probable as the most probable one; 0 = all.
        repetition_penalty: the logit of each token that the prompt or the generated text has is divided by this where
            it is positive, else multiplied (as Hugging Face's RepetitionPenaltyLogitsProcessor); 1 = none.
        presence_penalty, frequency_penalty: subtracted from the logit of each token that was generated, the latter as
            many times as it was (OpenAI's); tokens of the prompt do not count. 0 = none.
        logit_bias: token id -> what is added to its logit.
        processors: functions (ids, logits) -> logits, called in this order; see `Processor`.
        logprobs: report the log-probability of each token and of so many of the most probable ones, by the model's own
            logits; None = report nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    processors: tuple[Processor, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        require_real("temperature", self.temperature, 0, 1_000_000, "0 = greedy")
        require_whole("top_k", self.top_k, meaning="0 = all tokens")
        require_real("top_p", self.top_p, 1e-9, 1, "1 = all tokens")
        require_real("min_p", self.min_p, 0, 1, "0 = all tokens")
        require_real("repetition_penalty", self.repetition_penalty, 0.01, 100, "1 = none")
        require_real("presence_penalty", self.presence_penalty, -2, 2, "0 = none")
        require_real("frequency_penalty", self.frequency_penalty, -2, 2, "0 = none")
        if self.seed is not None:
            require_whole("seed", self.seed)
        if self.logprobs is not None:
            require_whole("logprobs", self.logprobs)
        if not isinstance(self.logit_bias, Mapping):
            raise DfssmError(f"logit_bias is {self.logit_bias!r}: give a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            require_whole("a token id of logit_bias", token)
            require_real(f"logit_bias of token {token}", bias, -100, 100)
        processors = (self.processors,) if callable(self.processors) else self.processors
        if not isinstance(processors, Iterable):
            raise DfssmError(f"processors is {processors!r}: give functions (ids, logits) -> logits")
        for processor in processors:
            if not callable(processor):
                raise DfssmError(f"a logits processor is {processor!r}: give a function (ids, logits) -> logits")
        object.__setattr__(self, "processors", tuple(processors))

    @property
    def needs_text(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.processors)

    def require_vocabulary(self, size: int) -> None:
        """DfssmError where `logit_bias` names a token that a model of `size` tokens does not have."""
        for token in self.logit_bias:
            if token >= size:
                raise DfssmError(f"logit_bias names token {token}: this model has ids 0 to {size - 1}")

    def choose(self, logits: np.ndarray, position: int) -> int:
        """The token after `position` others, from logits f32[V]. One whose logit is NaN or inf, where there is one.

        With a seed, the draw depends on the seed and the position alone: a text that is cut and continued is the same.
        """
        return self.choose_by(logits, self.random_bits(position))

    def choose_by(self, logits: np.ndarray, bits: int, total: int | None = None) -> int:
        """`choose` with these `random_bits`; `total`: the `total_weight`, where it is known."""
        count = self.count
        if not count:
            # Those of a language model that matter are few against its vocabulary: to sort the few hundred largest is
            # some twenty times cheaper than to sort all.
            count, total = _FEW, total_weight(logits, self.temperature) if total is None else total
        while True:
            tokens, of_them = largest(logits, count)
            at = self.choose_among(of_them, bits, total)
            if at is not None:
                return int(tokens[at])
            count *= 8

    @property
    def count(self) -> int:
        """How many of the largest logits decide: 1 of a greedy choice, 0 where all of them do."""
        return self.top_k if self.temperature else 1

    def random_bits(self, position: int) -> int:
        """What a draw goes by, a whole number below 2^53: one a choice, however often it looks."""
        return _random_bits(self.seed, position)

    def choose_among(self, logits: np.ndarray, bits: int, total: int | None = None) -> int | None:
        """`choose_by` from the largest logits, f32[n] in falling order: the index of one. All that decide, or as many
        as the caller has, with the `total_weight` of all: None where the choice is none of these.
        """
        if not math.isfinite(logits[0]) or (total is None and len(logits) == 1):
            return 0
        return self.draw(weights(logits, logits[0], self.temperature), bits, total)

    def draw(self, found: np.ndarray, bits: int, total: int | None) -> int | None:
        """`choose_among`, from the weights i32[n] of these logits."""
        sums = np.cumsum(found, dtype=np.int64)
        total = int(sums[-1]) if total is None else total
        kept = len(sums) + (int(sums[-1]) < total)  # of the largest; one more than there are: it takes others to tell
        if self.top_p < 1:
            kept = int(np.searchsorted(sums, self.top_p * total)) + 1
        if self.min_p:
            likely = int(np.searchsorted(-found, -self.min_p * found[0], side="right"))
            kept = min(kept, likely) if likely < len(sums) else kept
        if kept <= len(sums):
            total = int(sums[kept - 1])
        elif self.top_p < 1 or self.min_p:
            return None
        at = int(np.searchsorted(sums, bits * total >> 53, side="right"))
        return at if at < len(sums) else None


def _random_bits(seed: int | None, position: int) -> int:
    """A whole number below 2^53."""
    bits = os.urandom(8) if seed is None else blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(bits, "little") >> 11


_EXP2 = [np.float32(c) for c in (1.0, 0.69314697, 0.24022120, 0.05550713, 0.00967554, 0.00132765)]
"""2^x = sum of c_i x^i, for x in [-1/2, 1/2], within 2e-7."""

_PART = 1 << 14

_FEW, _NEAR = 256, 6.0
"""The tokens that are first looked at: at most so many, and at least exp(-_NEAR) times as probable as the first."""

_TO_WHOLE = np.float32(1.5 * 2**23)
"""What is added to this is rounded to a whole number, in the low bits of the sum."""


def weights(logits: np.ndarray, most: np.float32, temperature: float) -> np.ndarray:
    """Whole numbers i32[n] in proportion to the probabilities that the softmax gives to logits f32[n], which are finite
    or -inf; that of the largest of all, `most`, is 2^30.

    The same on every machine: these operations of fp32 are rounded alike everywhere, unlike exp, and sums of whole
    numbers have no order. A GPU makes them too: plugins/trt/largest/kernel.cu.
    """
    return _weights(logits, most, divisor(temperature))


def _weights(logits: np.ndarray, most: np.float32 | np.ndarray, by: np.float32 | np.ndarray) -> np.ndarray:
    """`weights` by a `divisor`; of several softmaxes, where `most` and `by` are arrays that broadcast."""
    with np.errstate(over="ignore"):  # -inf is right
        x: np.ndarray = logits - most
        x /= by
    x *= np.float32(math.log2(math.e))
    np.maximum(x, np.float32(-64), out=x)  # of which nothing is left
    power = x + _TO_WHOLE
    found = power - _TO_WHOLE
    x -= found
    np.multiply(x, _EXP2[-1], out=found)
    for coefficient in _EXP2[-2:0:-1]:
        found += coefficient
        found *= x
    found += _EXP2[0]
    exponent, bits = power.view(np.int32), found.view(np.int32)
    exponent <<= 23
    bits += exponent
    found *= np.float32(2**30)
    return found.astype(np.int32)


def divisor(temperature: float) -> np.float32:
    """Of the differences of logits: below this fp32 has no quotients; the draw is the greedy choice long before."""
    return np.float32(max(temperature, 1e-20))


def total_weight(logits: np.ndarray, temperature: float) -> int:
    """The sum of `weights`; 0 where a logit is NaN or inf."""
    most = logits.max()
    if not math.isfinite(most):
        return 0
    # In parts: malloc gives back what is larger than 128 KB, and its pages are then made anew, which took 200 us.
    parts = (logits[i : i + _PART] for i in range(0, len(logits), _PART))
    return sum(int(weights(part, most, temperature).sum(dtype=np.int64)) for part in parts)


def _totals(logits: np.ndarray, most: np.ndarray, by: np.ndarray) -> np.ndarray:
    """`total_weight` of each row of logits f32[n,V], by its largest and its divisor, f32[n,1]."""
    totals, width = np.zeros(len(logits), np.int64), max(1, _PART // len(logits))
    for start in range(0, logits.shape[1], width):
        totals += _weights(logits[:, start : start + width], most, by).sum(1, dtype=np.int64)
    return totals


def choose_each(samplings: Sequence[Sampling], logits: np.ndarray, positions: Sequence[int]) -> list[int]:
    """`Sampling.choose` of each row of logits f32[n,V], in a third of the time, as that is mostly of calls of NumPy."""
    if len(samplings) == 1:
        return [samplings[0].choose(logits[0], positions[0])]
    best = logits.argmax(1)
    most, chosen = logits[np.arange(len(best)), best], [int(token) for token in best]
    drawn = [row for row in range(len(chosen)) if samplings[row].count != 1 and math.isfinite(most[row])]
    if not drawn:
        return chosen
    by = np.array([divisor(sampling.temperature) for sampling in samplings])
    totals: dict[int, int] = {}
    if of_all := [row for row in drawn if not samplings[row].count]:
        found = _totals(logits[of_all], most[of_all, None], by[of_all, None])
        totals = {row: int(total) for row, total in zip(of_all, found, strict=True)}
    looks = {row: _first(logits[row], most[row], samplings[row]) for row in drawn}
    counts = [len(tokens) for tokens in looks.values()]
    values = np.concatenate([logits[row, tokens] for row, tokens in looks.items()])
    found = _weights(values, most[drawn].repeat(counts), by[drawn].repeat(counts))
    ends = np.cumsum(counts)
    for (row, tokens), of_them in zip(looks.items(), np.split(found, ends[:-1]), strict=True):
        bits = samplings[row].random_bits(positions[row])
        total = totals.get(row)
        at = samplings[row].draw(of_them, bits, total)
        chosen[row] = samplings[row].choose_by(logits[row], bits, total) if at is None else int(tokens[at])
    return chosen


def _first(logits: np.ndarray, most: np.float32, sampling: Sampling) -> np.ndarray:
    """The largest of logits f32[V], as tokens in falling order: all that decide or, where all do, those that most draws
    take. These are few against the vocabulary: the choice among the few hundred largest is some twenty times cheaper
    than among all.
    """
    tokens = np.flatnonzero(logits >= np.float32(most - _NEAR * sampling.temperature))
    count = sampling.count
    if len(tokens) < count or len(tokens) > (count or _FEW):
        return largest(logits, count or _FEW)[0]
    found: np.ndarray = tokens[np.argsort(-logits[tokens], kind="stable")]
    return found


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of logits f32[V] in falling order, those of one value by token, NaN before all: tokens
    i64[n] and logits f32[n].
    """
    if count == 1:
        best = int(np.argmax(logits))  # a NaN, if there is one
        return np.array([best]), logits[best : best + 1].copy()
    keys, nan = -logits, np.isnan(logits)
    keys[nan] = -np.inf
    bound = np.partition(keys, count - 1)[count - 1] if count < len(keys) else np.inf
    chosen = np.flatnonzero(keys <= bound)
    order = np.lexsort((keys[chosen], ~nan[chosen]))  # by the latter first; stable
    tokens = chosen[order[:count]]
    return tokens, logits[tokens]
