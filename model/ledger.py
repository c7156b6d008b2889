"""What a student weighs and what one step of it moves, in bytes, by role: the table of weights, added up."""

from __future__ import annotations

import math
from typing import Any

from dfssm.opset.layouts import LAYOUTS

from .config import DFSSMConfig
from .tensors import ROLES, student_tensors

_BYTES = {"float32": 4, "int8": 1, "uint8": 1}


def model_bytes(config: dict[str, Any], layout: int = 0) -> dict[str, int]:
    """Bytes of a student's tensors by role, from a config by its JSON keys; padding of files not counted."""
    found = dict.fromkeys(ROLES, 0)
    for name, tensor in student_tensors(DFSSMConfig.from_dict(config)).items():
        shape = tensor.shape
        if name.endswith((".bits", ".up")):  # whose rows the layout pads
            shape = (*shape[:-2], LAYOUTS[layout].padded(shape[-2]), shape[-1])
        found[tensor.role] += math.prod(shape) * _BYTES[tensor.dtype]
    return found


def weight_bytes_of_step(config: dict[str, Any], layout: int = 0) -> int:
    """Bytes of weights that a step reads, each once: all but the table of an untied embedding, of which it
    reads a row.
    """
    sizes_by_role = model_bytes(config, layout)
    return sum(sizes_by_role.values()) - (0 if config["tie_embeddings"] else sizes_by_role["embedding"])


def sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """d_inner, nheads, conv_dim and d_in_proj of a config by its JSON keys."""
    c = DFSSMConfig.from_dict(config)
    return c.d_inner, c.nheads, c.conv_dim, c.d_in_proj
