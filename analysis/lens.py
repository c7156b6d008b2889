"""What the head reads in hidden states: the rank of the right answer, and the tokens of a category."""

from __future__ import annotations

import numpy as np

from .subject import Subject

Array = np.ndarray


def ranks(logits: Array, tokens: Array) -> Array:
    """i64[N]: how many tokens logits [N,V] hold for likelier than tokens i64[N], plus 1: 1 is the first."""
    theirs = np.take_along_axis(logits, tokens[:, None], 1)
    return (logits > theirs).sum(1) + 1


def rank_trajectories(subject: Subject, states: Array, *answers: Array) -> list[Array]:
    """Of each of `answers` i64[N] the ranks i64[L+1,N] in what the head makes of states f32[L+1,N,D]."""
    found: list[list[Array]] = [[] for _ in answers]
    for layer in states:
        logits = subject.logits(layer)
        for one, tokens in zip(found, answers, strict=True):
            one.append(ranks(logits, tokens))
    return [np.stack(one) for one in found]


def directions(states: Array, members: Array) -> Array:
    """f32[K,D]: each category's centroid minus the mean of all states [N,D]; `members` as of `gram.one_hot`."""
    centroids = members.T @ states / members.sum(0)[:, None]
    found: Array = (centroids - states.mean(0)).astype(np.float32)
    return found


def hits(logits: Array, answers: list[Array], count: int = 10) -> float:
    """Of logits [K,V], mean over the categories of the share of their answers' tokens among the `count` first, or
    among as many as there are answers where those are fewer.
    """
    shares = []
    for row, wanted in zip(logits, answers, strict=True):
        first = np.argsort(-row, kind="stable")[:count]
        shares.append(np.isin(first, wanted).sum() / min(count, len(wanted)))
    return float(np.mean(shares))
