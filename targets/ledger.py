"""What a model weighs and what one step of it moves, in bytes, by role; all from the config."""

from __future__ import annotations

from typing import Any

from dfssm.opset.packing import padded_rows
from dfssm.opset.schema import LAYOUT_ROW16

# From the name of a tensor in model.pt to its role, first match.
_ROLES = (
    ("scaffold", (".bits", "_proj.scale")),
    ("low rank", (".down", ".down_scale", ".up", ".up_scale")),
    ("head", ("lm_head.weight", "lm_head.scale")),
    ("embedding", ("embedding.weight", "embedding.scale")),
    ("convolution", (".conv.weight", ".conv.bias")),
    ("scan", (".A_log", ".D", ".dt_bias")),
    ("norms", ("norm.weight", "norm_f.weight")),
)
ROLES = tuple(role for role, _ in _ROLES)


def role(tensor: str) -> str:
    """The role of a tensor of model.pt. KeyError for a name that is not of that format."""
    for name, endings in _ROLES:
        if tensor.endswith(endings):
            return name
    raise KeyError(tensor)


def model_bytes(config: dict[str, Any], layout: int = 0) -> dict[str, int]:
    """Bytes of a student's tensors by role, from a config by its JSON keys; padding of files not counted."""
    D, V, L, R = config["d_model"], config["vocab_size"], config["n_layer"], config["rank"]
    inner, heads, channels, in_rows = sizes(config)
    scaffold = low_rank = 0
    for rows, columns in ((in_rows, D), (D, inner)):
        stored = padded_rows(rows) if layout == LAYOUT_ROW16 else rows
        scaffold += config["planes"] * (stored * columns // 8 + 4 * rows)
        low_rank += R * columns + 4 * R + stored * R + 4 * rows
    table = V * D + 4 * V
    return {
        "scaffold": L * scaffold,
        "low rank": L * low_rank,
        "head": 0 if config["tie_embeddings"] else table,
        "embedding": table,
        "convolution": L * 4 * channels * (config["d_conv"] + 1),
        "scan": L * 4 * 3 * heads,
        "norms": L * 4 * (D + inner) + 4 * D,
    }


def weight_bytes_of_step(config: dict[str, Any], layout: int = 0) -> int:
    """Bytes of weights that a step reads, each once: all but the table of an untied embedding, of which it
    reads a row.
    """
    sizes_by_role = model_bytes(config, layout)
    return sum(sizes_by_role.values()) - (0 if config["tie_embeddings"] else sizes_by_role["embedding"])


def sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """d_inner, nheads, conv_dim and d_in_proj of a config by its JSON keys."""
    inner = config["expand"] * config["d_model"]
    heads = inner // config["headdim"]
    channels = inner + 2 * config["ngroups"] * config["d_state"]
    return inner, heads, channels, inner + channels + heads
