"""Whether a bundle's step is that of the config in its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dfssm.opset.errors import DfssmError
from dfssm.opset.schema import STATE_DTYPES
from dfssm.targets.bundle import Manifest

from .state import Layout, describe

_SIZES = ("vocab_size", "d_model", "n_layer", "d_state", "headdim", "expand", "ngroups", "d_conv")


def require_config(folder: Path, manifest: Manifest, layout: Layout, vocab_size: int) -> None:
    """DfssmError naming the first value of the manifest that is not so in what runs, whose states are of `layout`."""

    def differ(what: str, said: object, found: object) -> DfssmError:
        return DfssmError(f"{folder}: its manifest says {what} {said}, its graph has {found}: compile the model again")

    sizes: dict[str, Any] = {name: manifest.config.get(name) for name in _SIZES}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise DfssmError(f"{folder}: its manifest says {name} {size!r}, no size: compile the model again")
    if sizes["vocab_size"] != vocab_size:
        raise differ("vocab_size", sizes["vocab_size"], vocab_size)
    layers = sum(name.startswith("ssm_state.") for name in layout)
    if sizes["n_layer"] != layers:
        raise differ("n_layer", sizes["n_layer"], layers)
    said, found = _states(manifest.state_dtype, **sizes), dict(layout)
    for name in {**said, **found}:
        if said.get(name) != found.get(name):
            raise differ(name, describe(said.get(name)), describe(found.get(name)))


def _states(
    state_dtype: str, vocab_size: int, d_model: int, n_layer: int, d_state: int, headdim: int, expand: int,
    ngroups: int, d_conv: int,
) -> Layout:  # fmt: skip
    """The states of one row of a model of these sizes: docs/export.md."""
    channels = expand * d_model + 2 * ngroups * d_state
    heads = expand * d_model // headdim
    kinds = {
        "conv_state": (np.dtype(np.float32), (channels, d_conv - 1)),
        "ssm_state": (np.dtype(STATE_DTYPES[state_dtype]), (heads, d_state, headdim)),
    }
    if state_dtype == "int8":
        kinds["ssm_scale"] = (np.dtype(np.float32), (heads, d_state))
    return {f"{kind}.{i}": state for i in range(n_layer) for kind, state in kinds.items()}
