"""Whether a bundle's step is that of the config in its manifest."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.opset.errors import DfssmError
from dfssm.opset.sizes import Sizes
from dfssm.targets.bundle import Manifest

from .state import Layout, describe


def require_config(folder: Path, manifest: Manifest, layout: Layout, vocab_size: int) -> None:
    """DfssmError naming the first value of the manifest that is not so in what runs, whose states are of `layout`."""

    def differ(what: str, said: object, found: object) -> DfssmError:
        return DfssmError(f"{folder}: its manifest says {what} {said}, its graph has {found}: compile the model again")

    sizes: dict[str, Any] = {field.name: manifest.config.get(field.name) for field in fields(Sizes)}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise DfssmError(f"{folder}: its manifest says {name} {size!r}, no size: compile the model again")
    if sizes["vocab_size"] != vocab_size:
        raise differ("vocab_size", sizes["vocab_size"], vocab_size)
    layers = sum(name.startswith("ssm_state.") for name in layout)
    if sizes["n_layer"] != layers:
        raise differ("n_layer", sizes["n_layer"], layers)
    states = Sizes(**sizes).states(manifest.state_dtype)
    said = {f"{kind}.{i}": (np.dtype(dtype), shape) for i in range(layers) for kind, (dtype, shape) in states.items()}
    for name in {**said, **layout}:
        if said.get(name) != layout.get(name):
            raise differ(name, describe(said.get(name)), describe(layout.get(name)))
