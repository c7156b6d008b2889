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

_FIGURES = ("perplexity", "kl", "same_top")


@dataclass
class Measured:
    """Models by name on the held-out `windows` i64[n,tokens+1], if there are any.

    `perplexity`, and where there is a teacher `kl`, mean KL(teacher || model), nats a token, and `same_top`, the share
    of tokens for which both hold the same next one for the most probable.
    """

    windows: np.ndarray
    ranks: Ranks
    teacher: Mamba2LM | None
    perplexity: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    same_top: dict[str, float] = field(default_factory=dict)
    of: str = ""  # what tells these windows and models from others

    def state(self) -> dict:
        """What was measured so far."""
        return {"of": self.of} | {name: dict(getattr(self, name)) for name in _FIGURES}

    def take(self, state: dict) -> bool:
        """Have what was measured before; False where it is of something else."""
        if state.get("of") != self.of:
            return False
        for name in _FIGURES:
            setattr(self, name, dict(state[name]))
        return True

    def add(self, name: str, model: Callable) -> None:
        if not len(self.windows):
            return
        teacher = self.teacher if model is not self.teacher else None
        found = figures(model, teacher, self.windows, self.ranks)
        self.perplexity[name] = found["perplexity"]
        if teacher is not None:
            self.kl[name], self.same_top[name] = found["held_out_kl"], found["held_out_same_top"]


def figures(model: Callable, teacher: Mamba2LM | None, windows: np.ndarray, ranks: Ranks) -> dict[str, float]:
    """`held_out` loss, nats a token, and `perplexity`; of a `teacher` also `held_out_kl` and `held_out_same_top`."""

    def sums(part: Tensor) -> Tensor:
        logits = model(part[:, :-1])[0].float()
        found = [cross_entropy(logits, part)]
        if teacher is not None:
            wanted = teacher(part[:, :-1])[0].float()
            kl = torch.zeros_like(found[0])
            for x, y in zip(logits, wanted, strict=True):  # in fp32 there are three of each token's distributions
                kl += F.kl_div(x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="sum").double()
            found += [kl, (logits.argmax(-1) == wanted.argmax(-1)).sum().double()]
        return torch.stack(found)

    loss, *of_teacher = held_out_means(sums, windows, ranks)
    found = {"held_out": loss, "perplexity": math.exp(min(loss, 700.0))}
    return found | dict(zip(("held_out_kl", "held_out_same_top"), of_teacher, strict=False))


def cut_windows(ids: np.ndarray, tokens: int, most: int | None = None) -> np.ndarray:
    """The held-out text ids[n] as windows i64[count,tokens+1] that follow one another; a shorter last one is left out.

    Where they predict more than `most` tokens: as many of them as predict no more, at least one, spread evenly.
    """
    count = max(0, (len(ids) - 1) // tokens)
    if not count:
        return np.empty((0, tokens + 1), np.int64)
    kept = count if most is None else min(count, max(1, most // tokens))
    windows = np.lib.stride_tricks.sliding_window_view(ids, tokens + 1)[::tokens]
    return windows[np.arange(kept) * count // kept].astype(np.int64)


def cross_entropy(logits: Tensor, windows: Tensor) -> Tensor:
    """Of logits[B,T,V] against the tokens that came in windows i64[B,T+1]: nats f64[], summed over all."""
    labels = windows[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum").double()


@torch.no_grad()
def held_out_means(sums: Callable[[Tensor], Tensor], windows: np.ndarray, ranks: Ranks, batch: int = 8) -> list[float]:
    """Mean over tokens of what sums(i64[B,tokens+1]) gives, f64[m] summed over the tokens of some windows.

    Each window is for a zero state. They are shared among the ranks, and all get the mean.
    """
    count, tokens = len(windows), windows.shape[1] - 1
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    # Not compiled: the last batch is smaller, and the programs for both would take longer than they save.
    with torch.compiler.set_stance("force_eager"):
        for begin in range(0, count, batch * ranks.world):
            first = begin + ranks.rank * batch
            part = torch.from_numpy(windows[first : first + batch] if first < count else windows[:1]).to(ranks.device)
            found = sums(part)  # without a window of its own too: calls are collective
            total = total + found * (first < count)
    return (ranks.mean(total) * ranks.world / (count * tokens)).tolist()
