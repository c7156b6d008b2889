"""The shape of a layer's states: principal components, how many it takes, and how alike two models' shapes are."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def principal(states: Array, count: int = 2) -> tuple[Array, Array]:
    """Of states [N,D]: coordinates f64[N,count] along the first principal components, and each one's share of the
    variance. A component's largest weight is positive.
    """
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    axes, kept = axes[:count], values[:count]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    shares = kept**2 / max((values**2).sum(), np.finfo(float).tiny)
    return centred @ (axes * signs[:, None]).T, shares


def explained(points: Array, labels: Array) -> float:
    """Share of the variance of points [N,d] that their labels explain (eta squared): 0 for none, 1 for all."""
    centred = points - points.mean(0)
    groups = [centred[labels == label] for label in np.unique(labels)]
    between = sum(len(group) * (group.mean(0) ** 2).sum() for group in groups)
    return float(between / max((centred**2).sum(), np.finfo(float).tiny))


def dimension(states: Array, share: float = 0.95) -> int:
    """How many principal components hold `share` of the variance of states [N,D]; 0 where there is none."""
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    total = variances.sum()
    if total <= np.finfo(np.float32).eps ** 2 * (states.astype(np.float64) ** 2).sum():
        return 0
    return int(np.searchsorted(np.cumsum(variances) / total, share - 1e-12) + 1)


def shuffled_columns(states: Array, rng: np.random.Generator) -> Array:
    """Each channel's values dealt to the prompts anew: as spread as before, and independent."""
    return rng.permuted(states, axis=0)


def linear_cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment of [N,D] and [N,E] (Kornblith et al., 2019): 1 where one is the other but for
    rotation and size, 0 where nothing of one is linear in the other; 0 where one has no variance.
    """
    x, y = (v.astype(np.float64) - v.mean(0, dtype=np.float64) for v in (x, y))
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norms) if norms > 0 else 0.0
