"""What a student weighs and what one step of it moves, in bytes, by role: the table of weights, added up."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from dfssm.base.errors import DfssmError
from dfssm.opset.layouts import LAYOUTS

from .config import DFSSMConfig, Scaffold
from .tensors import PARTS, ROLES, SCAFFOLD, student_tensors

_BYTES = {"float32": 4, "int8": 1, "uint8": 1}


def model_bytes(config: dict[str, Any], layout: int = 0) -> dict[str, int]:
    """Bytes of a student's tensors by role, from a config by its JSON keys; padding of files not counted."""
    found, of = dict.fromkeys(ROLES, 0), DFSSMConfig.from_dict(config)
    once = dataclasses.replace(of, n_layer=1) if of.alike else of  # a config may say a million layers
    for name, tensor in student_tensors(once).items():
        shape, count = tensor.shape, of.n_layer // once.n_layer if name.startswith("layers.") else 1
        if name.endswith((".bits", ".up")):  # whose rows the layout pads
            shape = (*shape[:-2], LAYOUTS[layout].padded(shape[-2]), shape[-1])
        found[tensor.role] += count * math.prod(shape) * _BYTES[tensor.dtype]
    return found


def scaffold_bytes(rows: int, columns: int, of: Scaffold) -> int:
    """Bytes of a projection in model.pt."""
    return sum(math.prod(part.shape(rows, columns, of)) * _BYTES[part.dtype] for part in PARTS[SCAFFOLD].values())


def bundle_bytes(folder: Path, manifest: Any) -> dict[str, int]:
    """`model_bytes` of a bundle. DfssmError where its config is none, or is of more weights than its file holds."""
    try:
        found = model_bytes(manifest.config, manifest.layout)
    except DfssmError as error:
        raise DfssmError(f"{folder}/manifest.json: {error}; compile the model again") from None
    # An engine may lack its weights, or keep them otherwise.
    said, held = sum(found.values()), manifest.files[manifest.weights]["bytes"]
    if said > held and not manifest.engine:
        what = f"{folder}: the config in its manifest is of {said:,} bytes of weights"
        raise DfssmError(f"{what}, {manifest.weights} has {held:,}: compile the model again")
    return found


def weight_bytes_of_step(config: dict[str, Any], layout: int = 0) -> int:
    """Bytes of weights that a step reads, each once: all but the table of an untied embedding, of which it
    reads a row.
    """
    sizes_by_role = model_bytes(config, layout)
    return sum(sizes_by_role.values()) - (0 if config["tie_embeddings"] else sizes_by_role["embedding"])


def operations_of_step(config: dict[str, Any]) -> int:
    """Additions and multiplications of one token of one sequence: two for each weight of a product or a convolution,
    five for each number of the SSM state (its decay, what is added, the sum with C).
    """
    of = DFSSMConfig.from_dict(config)
    once = dataclasses.replace(of, n_layer=1) if of.alike else of  # a config may say a million layers
    layers, outside = 0, of.vocab_size * of.d_model
    for name, tensor in student_tensors(once).items():
        if name.startswith("layers.") and name.endswith((".bits", ".down", ".up", ".conv.weight")):
            layers += math.prod(tensor.shape) * (8 if name.endswith(".bits") else 1)
    states = of.n_layer * of.nheads * of.d_state * of.headdim
    return 2 * (layers * of.n_layer // once.n_layer + outside) + 5 * states


def sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """d_inner, nheads, conv_dim and d_in_proj of a config by its JSON keys."""
    c = DFSSMConfig.from_dict(config)
    return c.d_inner, c.nheads, c.conv_dim, c.d_in_proj
