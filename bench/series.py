"""Figures of rounds, summed up."""

from __future__ import annotations

import numpy as np


def tokens_a_second(rates: np.ndarray, prefix: str = "") -> dict:
    """Median and quartiles of f64[rounds], by the keys of docs/json.md."""
    low, median, high = np.percentile(rates, [25, 50, 75]).tolist()
    return {f"{prefix}tok_s": median, f"{prefix}tok_s_quartiles": [low, high]}
