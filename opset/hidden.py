"""Hidden states, as a teacher, a student and a bundle give them: one form, its checks, and rows of unequal lengths.

Layer 0 is the embedding, layer i the residual stream after the i-th block; the last one is what the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.numbers import require_whole

Patch = Mapping[int, np.ndarray]
"""Layer -> f32[B,D], which takes the place of the last token's residual there."""

Run = Callable[[np.ndarray, list[int], bool, Patch], tuple[np.ndarray, np.ndarray]]
"""A model over ids i64[n,T] from zero states, with the layers that are wanted, whether of the last token only, and a
patch f32[n,D]: states f32[L,n,D] or f32[L,n,T,D], and the logits f32[n,V] of the last token."""


class Hidden(NamedTuple):
    """`states` f32[L,B,D] of the last token, or f32[L,B,T,D]; `logits` f32[B,V] of the last token."""

    states: np.ndarray
    logits: np.ndarray


def hidden_of_rows(
    run: Run,
    rows: Sequence[np.ndarray],
    n_layer: int,
    d_model: int,
    layers: Sequence[int] | None = None,
    last: bool = True,
    patch: Patch | None = None,
) -> Hidden:
    """`run` over rows i64[T], those of one length together. `layers` None: all of them, 0 to `n_layer`.

    Raises DfssmError for a layer or a patch that the model cannot have, for rows of unequal lengths of which all tokens
    are wanted, and where a number is not finite.
    """
    wanted = list(range(n_layer + 1) if layers is None else layers)
    given = {layer: np.asarray(array, np.float32) for layer, array in (patch or {}).items()}
    for layer in (*wanted, *given):
        require_whole("layer", layer, 0, n_layer, "0 is the embedding")
    for layer, array in given.items():
        if array.shape != (len(rows), d_model):
            shape = list(array.shape)
            raise DfssmError(f"the patch of layer {layer} has shape {shape}: give [{len(rows)}, {d_model}], a row each")
    lengths = np.array([len(row) for row in rows])
    if not last and len(set(lengths)) > 1:
        raise DfssmError("hidden states of all tokens of rows of unequal lengths: call it row by row")
    states: Any = np.empty(0, np.float32)
    logits: Any = states
    for length in np.unique(lengths):
        at = np.flatnonzero(lengths == length)
        ids = np.stack([rows[i] for i in at.tolist()])
        some, ends = run(ids, wanted, last, {layer: array[at] for layer, array in given.items()})
        if not logits.size:
            states = np.empty((len(wanted), len(rows), *some.shape[2:]), np.float32)
            logits = np.empty((len(rows), ends.shape[1]), np.float32)
        states[:, at], logits[at] = some, ends
    checked = [*zip(wanted, states, strict=True), (n_layer, logits)]
    for layer, values in checked:
        if not np.isfinite(values).all():
            raise DfssmError(f"the model's numbers are not finite up to layer {layer}: its weights are too large")
    return Hidden(states, logits)
