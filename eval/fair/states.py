"""A student whose states are stored in other forms, and what it answers then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dfssm.model.quant import LARGEST, dequantized, half
from dfssm.model.teacher import Mamba2LM, Mamba2State
from dfssm.opset.schema import BLOCK, TINY

from .language import END, Document

Store = Callable[[Tensor], Tensor]
"""What storing an SSM state f32[B,H,N,P] leaves of it; one for each layer, which may remember."""


class Feedback:
    """int8 with the error fed back in time: what rounding takes from an element is added to the same element when it is
    stored next. The published density-field state does so, with 8 bits for the error (here in 1/128 of a step) beside
    those of the value: two bytes an element, as fp16.
    """

    def __init__(self) -> None:
        self.error: Tensor | None = None

    def __call__(self, state: Tensor) -> Tensor:
        step = (state.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(TINY)
        wanted = state / step + (0.0 if self.error is None else self.error)
        codes = wanted.round().clamp(-LARGEST, LARGEST)
        self.error = ((wanted - codes) * 128).round().clamp(-128, 127) / 128
        return codes * step


def _new(store: Store) -> Callable[[], Store]:
    return lambda: store


FORMS: dict[str, tuple[Callable[[], Store], int]] = {
    "fp32": (_new(lambda state: state), 0),
    "fp16": (_new(lambda state: half(state).float()), 1),
    "fp16-deferred": (_new(lambda state: half(state).float()), BLOCK),
    "int8": (_new(dequantized), 1),
    "int8-deferred": (_new(dequantized), BLOCK),
    "int8, error fed back in time": (Feedback, 1),
}
"""Name -> what stores the state of a layer, and after how many tokens; 0: never. A deferred state is the state of every
eighth token (`dfssm.opset.pending`), and exact in between."""


@torch.inference_mode()
def likeliest(model: Mamba2LM, ids: Tensor, form: str) -> Tensor:
    """The token that the model holds for the likeliest after each of ids i64[B,T], its states stored in `form`."""
    new, every = FORMS[form]
    stores = [new() for _ in range(model.config.n_layer)]
    state: Mamba2State = model.new_state(len(ids))
    found = []
    for piece in ids.split(every or ids.shape[1], dim=1):
        logits, state = model(piece, state)
        found.append(logits.argmax(-1))
        state.ssm = [store(ssm) for store, ssm in zip(stores, state.ssm, strict=True)]
    return torch.cat(found, dim=1)


def answered(model: Mamba2LM, documents: Sequence[Document], form: str) -> float:
    """Share of the tokens which can be known that `model` holds for the likeliest, in documents of one length, each
    read after END.
    """
    ids = torch.from_numpy(np.stack([document.ids for document in documents]))
    known = torch.from_numpy(np.stack([document.known for document in documents]))
    inputs = torch.cat((torch.full_like(ids[:, :1], END), ids[:, :-1]), dim=1)
    return float((likeliest(model, inputs, form) == ids)[known].float().mean())
