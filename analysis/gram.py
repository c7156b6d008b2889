"""How labels lie in states, from the products of all pairs alone: separation, and leave-one-out nearest centroids.

Both need only the N x N products of a layer's states, whatever D is, so that hundreds of draws cost little: labels
shuffled, or prompts drawn with repetition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def cosines(states: Array) -> Array:
    """f64[N,N] of states [N,D]; 0 with itself, so that no sum of pairs counts it, and with a state of zeros."""
    norms = np.linalg.norm(states, axis=1, keepdims=True).astype(np.float64)
    unit = states / np.where(norms > 0, norms, 1)
    found = unit @ unit.T
    np.fill_diagonal(found, 0)
    return found


def one_hot(labels: Array) -> Array:
    """f64[N,K] of labels i64[N]."""
    return np.eye(labels.max() + 1)[labels]


def separation(cosine: Array, members: Array, weights: Array | None = None) -> float:
    """Mean cosine of the pairs of one category minus that of the pairs of two; `members` as of `one_hot`.

    `weights` [N]: how often each prompt counts. A prompt that was drawn twice makes no pair with itself.
    """
    w = np.ones(len(members)) if weights is None else weights
    weighted = members * w[:, None]
    within = np.einsum("nk,nk->", weighted, cosine @ weighted)
    squares = float(w @ w)
    pairs_within = (weighted.sum(0) ** 2).sum() - squares
    between, pairs = w @ cosine @ w - within, w.sum() ** 2 - squares
    return float(within / pairs_within - between / (pairs - pairs_within))


def by_category(cosine: Array, members: Array) -> Array:
    """f64[K]: of each category, the mean cosine within it minus that with all others."""
    sizes, total = members.sum(0), len(members)
    products = cosine @ members
    within = (members * products).sum(0)
    with_all = (members * products.sum(1, keepdims=True)).sum(0)
    return within / (sizes * (sizes - 1)) - (with_all - within) / (sizes * (total - sizes))


def centroid_accuracy(products: Array, members: Array) -> float:
    """Share of the prompts whose nearest centroid (Euclidean) is their own category's, each left out of its own.

    products f64[N,N] of states (x_i . x_j); a category has two prompts or more, others are not counted.
    """
    sizes = members.sum(0)
    with_centroid = products @ members / sizes  # x_i . m_c
    centroids = np.einsum("nk,nk->k", members, with_centroid) / sizes  # m_c . m_c
    distances = np.diag(products)[:, None] - 2 * with_centroid + centroids
    own = members.argmax(1)
    counted = sizes[own] > 1
    # x - (n m - x) / (n - 1) = n / (n - 1) (x - m)
    left_out = (sizes / np.maximum(sizes - 1, 1))[own] ** 2
    rows = np.arange(len(own))
    distances[rows, own] *= left_out
    return float((distances.argmin(1) == own)[counted].mean())


@dataclass(frozen=True)
class Draws:
    """Labels shuffled, and prompts drawn with repetition within their category: the same draws for every layer."""

    shuffled: list[Array]  # one_hot
    weights: list[Array]  # [N]

    @classmethod
    def of(cls, labels: Array, count: int, seed: int) -> Draws:
        rng = np.random.default_rng(seed)
        shuffled = [one_hot(rng.permutation(labels)) for _ in range(count)]
        groups = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        weights = []
        for _ in range(count):
            drawn = np.concatenate([rng.choice(group, len(group)) for group in groups])
            weights.append(np.bincount(drawn, minlength=len(labels)).astype(float))
        return cls(shuffled, weights)


def layers(states: Array) -> Iterator[Array]:
    """Of states [L+1,N,D] each layer's, f64."""
    for layer in states:
        yield layer.astype(np.float64)
