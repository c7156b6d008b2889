"""Choosing the next token from logits: what changes them, the filters, the draw. NumPy only, deterministic by seed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from dfssm.opset.errors import DfssmError
from dfssm.opset.numbers import require_real, require_whole

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
        return choose_each([self], logits[None], [position])[0]

    @property
    def count(self) -> int:
        """How many of the largest logits decide: 1 of a greedy choice, 0 where all of them do."""
        return self.top_k if self.temperature else 1

    def choose_among(self, logits: np.ndarray, position: int, total: int | None = None) -> int | None:
        """`choose` from the largest logits, f32[n] in falling order: the index of one. All that decide, or as many as
        the caller has, with the `total_weight` of all: None where the choice is none of these.
        """
        if not math.isfinite(logits[0]) or (total is None and len(logits) == 1):
            return 0
        return self._draw(weights(logits, logits[0], self.temperature), position, total)

    def _draw(self, found: np.ndarray, position: int, total: int | None) -> int | None:
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
        at = int(np.searchsorted(sums, _random_bits(self.seed, position) * total >> 53, side="right"))
        return at if at < len(sums) else None


def _random_bits(seed: int | None, position: int) -> int:
    """A whole number below 2^53."""
    bits = os.urandom(8) if seed is None else blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(bits, "little") >> 11


_EXP2 = [np.float32(c) for c in (1.0, 0.69314697, 0.24022120, 0.05550713, 0.00967554, 0.00132765)]
"""2^x = sum of c_i x^i, for x in [-1/2, 1/2], within 2e-7."""

_PART = 1 << 14

_FEW, _NEAR = 256, 5.0
"""The tokens that are first looked at: at most so many, and at least exp(-_NEAR) times as probable as the first."""

_TO_WHOLE = np.float32(1.5 * 2**23)
"""What is added to this is rounded to a whole number, in the low bits of the sum."""


def weights(logits: np.ndarray, most: np.float32 | np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Whole numbers i32[...] in proportion to the probabilities that the softmax gives to logits f32[...], which are
    finite or -inf; that of the largest of all, `most`, is 2^30. Several softmaxes have their own `most` and
    `temperature`, arrays that broadcast.

    The same on every machine: these operations of fp32 are rounded alike everywhere, unlike exp, and sums of whole
    numbers have no order. A GPU makes them too: plugins/trt/largest/kernel.cu.
    """
    with np.errstate(over="ignore"):  # -inf is right
        x: np.ndarray = logits - most
        x /= divisor(temperature)
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


def divisor(temperature: float | np.ndarray) -> np.float32:
    """Of the differences of logits: below this fp32 has no quotients; the draw is the greedy choice long before."""
    return np.float32(np.maximum(temperature, 1e-20))


def total_weight(logits: np.ndarray, temperature: float) -> int:
    """The sum of `weights`; 0 where a logit is NaN or inf."""
    return _totals(logits[None], np.array([temperature]))[0] if math.isfinite(logits.max()) else 0


def _totals(logits: np.ndarray, temperatures: np.ndarray) -> list[int]:
    """`total_weight` of each row of logits f32[n,V], which has a finite maximum, by temperatures [n]."""
    most, by, totals = logits.max(1, keepdims=True), temperatures[:, None], np.zeros(len(logits), np.int64)
    # In parts: malloc gives back what is larger than 128 KB, and its pages are then made anew, which took 200 us.
    width = max(1, _PART // len(logits))
    for start in range(0, logits.shape[1], width):
        totals += weights(logits[:, start : start + width], most, by).sum(1, dtype=np.int64)
    return [int(total) for total in totals]


def choose_each(samplings: Sequence[Sampling], logits: np.ndarray, positions: Sequence[int]) -> list[int]:
    """`Sampling.choose` of each row of logits f32[n,V]. Together, as that takes a third of the time: most of it is that
    of calls of NumPy.
    """
    best = logits.argmax(1)
    most, chosen = logits[np.arange(len(best)), best], [int(token) for token in best]
    drawn = [row for row in range(len(chosen)) if samplings[row].count != 1 and math.isfinite(most[row])]
    if not drawn:
        return chosen
    temperatures = np.array([samplings[row].temperature for row in drawn])
    of_all = [at for at, row in enumerate(drawn) if not samplings[row].count]
    totals: dict[int, int] = {}
    if of_all:
        rows = [drawn[at] for at in of_all]
        totals = dict(zip(rows, _totals(logits[rows], temperatures[of_all]), strict=True))
    looks = [_first(logits[row], most[row], samplings[row]) for row in drawn]
    counts = [len(tokens) for tokens in looks]
    found = weights(
        np.concatenate([logits[row, tokens] for row, tokens in zip(drawn, looks, strict=True)]),
        np.repeat(most[drawn], counts),
        np.repeat(temperatures, counts),
    )
    ends = np.cumsum(counts).tolist()
    for row, tokens, count, end in zip(drawn, looks, counts, ends, strict=True):
        at = samplings[row]._draw(found[end - count : end], positions[row], totals.get(row))
        while at is None:
            count = max(_FEW, 8 * count)
            tokens, values = largest(logits[row], count)
            at = samplings[row].choose_among(values, positions[row], totals[row])
        chosen[row] = int(tokens[at])
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
