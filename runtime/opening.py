"""Opening what runs a bundle, and whether that is the step of the config in its manifest."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.base.endings import end_ids
from dfssm.base.errors import DfssmError
from dfssm.opset.sizes import Sizes
from dfssm.targets import get_target, has_engine
from dfssm.targets.bundle import Bundle, Manifest
from dfssm.targets.trust import own_library

from .backend import Backend
from .state import describe


def open_backend(bundle: Bundle, threads: int, trust: bool = False, mmap: bool = True) -> Backend:
    """The backend of the bundle's target. DfssmError when it cannot run here, holds code that is not trusted, or is not
    what its manifest says.
    """
    target = get_target(bundle.manifest.target)
    own = own_library(bundle, target.LIBRARY, trust)
    backend: Backend
    if has_engine(target):
        from .cuda import Cuda
        from .tensorrt import TensorRTBackend

        target.check(bundle.folder, bundle.manifest, own)
        cuda = Cuda(target.plugin_library(bundle.manifest.engine, own))
        with cuda.device():
            opened = target.open_engine(bundle, bundle.manifest, own, trust)
        backend = TensorRTBackend(opened, cuda, in_place=bundle.manifest.engine["lowering"] == "plugin")
    else:
        from .ort import OrtBackend

        session = target.open_session(bundle, threads=threads, own=own, mmap=mmap)
        backend = OrtBackend(session, in_place=target.IN_PLACE)
    require_config(bundle.folder, bundle.manifest, backend)
    return backend


def require_config(folder: Path, manifest: Manifest, backend: Backend) -> None:
    """DfssmError naming the first value of the manifest that is not so in what runs."""

    def differ(what: str, said: object, found: object) -> DfssmError:
        return DfssmError(f"{folder}: its manifest says {what} {said}, its graph has {found}: compile the model again")

    sizes: dict[str, Any] = {field.name: manifest.config.get(field.name) for field in fields(Sizes)}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise DfssmError(f"{folder}: its manifest says {name} {size!r}, no size: compile the model again")
    layout = backend.layout
    for name, found in (("vocab_size", backend.vocab_size), ("d_model", backend.d_model or sizes["d_model"])):
        if sizes[name] != found:
            raise differ(name, sizes[name], found)
    layers = sum(name.startswith("ssm_state.") for name in layout)
    if sizes["n_layer"] != layers:
        raise differ("n_layer", sizes["n_layer"], layers)
    states = Sizes(**sizes).states(manifest.state_dtype)
    said = {f"{kind}.{i}": (np.dtype(dtype), shape) for i in range(layers) for kind, (dtype, shape) in states.items()}
    for name in {**said, **layout}:
        if said.get(name) != layout.get(name):
            raise differ(name, describe(said.get(name)), describe(layout.get(name)))
    for name in ("eos_token_id", "bos_token_id"):
        try:
            end_ids(manifest.config.get(name), sizes["vocab_size"], name)
        except DfssmError as error:
            raise DfssmError(f"{folder}/manifest.json: {error}; compile the model again") from None
