"""The choices of one text: what its sampling looks at, and what is to be told of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dfssm.base.errors import DfssmError

from .sampling import Sampling, largest


class TokenLogprobs(NamedTuple):
    """How probable a token was to the model, before penalties, bias, processors and filters, in natural logarithms.

    `top`: the most probable tokens, with theirs, in falling order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one text by `sampling`, and has what that looks at.

    Args: `prompt`, `generated`: the tokens of the text before its first choice here, given and chosen.
    Attributes: `sampling`, `prompt`, `generated` (with each choice), `logprobs` (an entry a choice, where asked for).
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()):
        self.sampling = sampling
        self.prompt, self.generated = [*map(int, prompt)], [*map(int, generated)]
        self.logprobs: list[TokenLogprobs] = []
        # Whether a choice takes all logits of a row, on the host.
        self._counts = sampling.needs_text
        self.needs_logits = self._counts or bool(sampling.logit_bias) or sampling.logprobs is not None
        # Token of the text, prompt included -> how often it was generated; for what asks for that.
        self._times = dict.fromkeys(self.prompt, 0) if self._counts else {}
        for token in self.generated:
            self._count(token)

    @classmethod
    def of(cls, given: Sampling | Sampler) -> Sampler:
        """`given`, or a sampler of one choice by it. DfssmError where that takes the text, which a `Sampling` lacks."""
        if isinstance(given, Sampler):
            return given
        if given.needs_text or given.logprobs is not None:
            raise DfssmError(
                "penalties, processors and logprobs are of one text: give Sampler(sampling, prompt), which goes with it"
            )
        return cls(given)

    def choose(self, logits: np.ndarray, position: int) -> int:
        """The token after `position` others, from the model's logits f32[V], which stay as they are; it is added to the
        text. One whose logit is NaN or inf, where there is one; nothing is added then.
        """
        most = int(np.argmax(logits))  # a NaN, where there is one
        if not math.isfinite(logits[most]):
            return most
        token = self.sampling.choose(self.changed(logits), position)
        self.add(token)
        if self.sampling.logprobs is not None:
            self.logprobs.append(_logprobs(logits, token, self.sampling.logprobs))
        return token

    def add(self, token: int) -> None:
        """`token` was chosen."""
        self.generated.append(token)
        self._count(token)

    def _count(self, token: int) -> None:
        if self._counts:
            self._times[token] = self._times.get(token, 0) + 1

    def changed(self, logits: np.ndarray) -> np.ndarray:
        """The logits f32[V] that the filters get. DfssmError where processors leave none that can be chosen, or return
        what are no logits.
        """
        sampling, logits = self.sampling, logits.copy()
        sampling.require_vocabulary(len(logits))
        tokens = np.fromiter(self._times, np.int64, len(self._times))
        if sampling.repetition_penalty != 1:
            penalty, found = np.float32(sampling.repetition_penalty), logits[tokens]
            logits[tokens] = np.where(found < 0, found * penalty, found / penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            times = np.fromiter(self._times.values(), np.float32, len(self._times))
            logits[tokens] -= np.float32(sampling.frequency_penalty) * times
            logits[tokens] -= np.float32(sampling.presence_penalty) * (times > 0)
        for token, bias in sampling.logit_bias.items():
            logits[token] += np.float32(bias)
        if sampling.processors:
            logits = self._processed(logits)
        return logits

    def _processed(self, logits: np.ndarray) -> np.ndarray:
        ids, shape = np.array(self.prompt + self.generated, np.int64), logits.shape
        for processor in self.sampling.processors:
            name = getattr(processor, "__name__", type(processor).__name__)
            logits = processor(ids, logits)
            if not isinstance(logits, np.ndarray) or logits.shape != shape or logits.dtype.kind != "f":
                found = f"{logits.dtype}{list(logits.shape)}" if isinstance(logits, np.ndarray) else repr(logits)
                raise DfssmError(f"logits processor {name} returned {found}: return an array f32{list(shape)}")
            logits = logits.astype(np.float32, copy=False)
            if not math.isfinite(logits.max()):
                raise DfssmError(
                    f"logits processor {name} returned {logits.max()} as the largest logit: leave one that is finite, "
                    "and -inf for tokens that must not be chosen"
                )
        return logits


def _logprobs(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """Of `token` and of the `count` most probable tokens, by the softmax of logits f32[V]."""
    most = float(logits.max())
    total = most + math.log(np.exp(logits.astype(np.float64) - most).sum())
    tokens, found = largest(logits, min(count, len(logits))) if count else (np.empty(0, int), np.empty(0))
    top = zip(tokens.tolist(), (float(logit) - total for logit in found), strict=True)
    return TokenLogprobs(token, float(logits[token]) - total, tuple(top))
