"""What a model is worth on text that no step trains on: its perplexity, and its divergence from the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfssm.model.teacher import Mamba2LM

from .distributed import Ranks


@dataclass
class Measured:
    """Models by name on the held-out tokens `ids`, if there are any, in windows of `tokens`.

    `perplexity`, and `kl`: mean KL(teacher || model), nats a token, where there is a teacher.
    """

    ids: np.ndarray
    tokens: int
    ranks: Ranks
    teacher: Mamba2LM | None
    perplexity: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, model: Callable) -> None:
        if not len(self.ids):
            return

        def sums(windows: Tensor) -> Tensor:
            logits = model(windows[:, :-1])[0].float()
            found = [cross_entropy(logits, windows)]
            if self.teacher is not None and model is not self.teacher:
                wanted = self.teacher(windows[:, :-1])[0].float()
                # A window at a time: in fp32 there are three of each token's distributions.
                pairs = ((x.log_softmax(-1), y.log_softmax(-1)) for x, y in zip(logits, wanted, strict=True))
                found.append(sum(F.kl_div(p, q, log_target=True, reduction="sum").double() for p, q in pairs))
            return torch.stack(found)

        loss, *kl = held_out_means(sums, self.ids, self.tokens, self.ranks)
        self.perplexity[name] = math.exp(loss)
        if kl:
            self.kl[name] = kl[0]


def held_out_loss(model: Callable, ids: np.ndarray, tokens: int, ranks: Ranks, batch: int = 8) -> float:
    """Mean loss, nats a token, as `held_out_means` goes over the text."""
    return held_out_means(lambda windows: cross_entropy(model(windows[:, :-1])[0], windows), ids, tokens, ranks, batch)


def cross_entropy(logits: Tensor, windows: Tensor) -> Tensor:
    """Of logits[B,T,V] against the tokens that came in windows i64[B,T+1]: nats f64[], summed over all."""
    labels = windows[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum").double()


@torch.no_grad()
def held_out_means(
    sums: Callable[[Tensor], Tensor], ids: np.ndarray, tokens: int, ranks: Ranks, batch: int = 8
) -> float | list[float]:
    """Mean over tokens of what sums(windows i64[B,tokens+1]) gives, f64[] or f64[n] summed over their tokens.

    The windows follow one another, each for a zero state, and are shared among the ranks; all get the mean. The last,
    shorter window is left out.
    """
    count = (len(ids) - 1) // tokens
    rows = np.stack([ids[i * tokens : (i + 1) * tokens + 1] for i in range(count)]).astype(np.int64)
    total = 0.0
    # Not compiled: the last batch is smaller, and the programs for both would take longer than they save.
    with torch.compiler.set_stance("force_eager"):
        for begin in range(0, count, batch * ranks.world):
            first = begin + ranks.rank * batch
            part = torch.from_numpy(rows[first : first + batch] if first < count else rows[:1]).to(ranks.device)
            found = sums(part)  # without a window of its own too: calls are collective
            total = total + found * (first < count)
    return (ranks.mean(total) * ranks.world / (count * tokens)).tolist()
