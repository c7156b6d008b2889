"""The hidden states of a bundle, from the tapped graph that `dfcompile --taps` writes over the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.opset.hidden import Patch
from dfssm.targets import get_target
from dfssm.targets.bundle import TAPS, Manifest, open_bundle
from dfssm.targets.session import run_error
from dfssm.targets.trust import own_library

from .state import Layout

HIDDEN, PATCH, PATCHED = "hidden", "patch", "patched"
"""Of layer 3: the output `hidden.3` f32[B,T,D]; the inputs `patch.3` f32[B,1,D] and `patched.3` bool[1,T,1], which
says of which tokens the patch takes the place, by default of none."""


class Taps:
    """The tapped graph of the bundle in `folder`, which must still be the one of this manifest."""

    def __init__(self, folder: Path, manifest: Manifest, layout: Layout, threads: int, trust: bool):
        if TAPS not in manifest.files:
            raise DfssmError(f"{folder} shows no hidden states: compile it again with --taps, for ort-cpu or onnx")
        target = get_target(manifest.target)
        with open_bundle(folder) as bundle:
            if bundle.manifest != manifest:
                raise DfssmError(f"{folder} has changed since it was opened: load it again")
            own = own_library(bundle, target.LIBRARY, trust)
            self._session = target.open_session(bundle, threads=threads, model=TAPS, own=own)
        self._layout = layout

    def run(self, ids: np.ndarray, layers: list[int], last: bool, patch: Patch) -> tuple[np.ndarray, np.ndarray]:
        """As `dfssm.opset.hidden.Run`."""
        rows, tokens = ids.shape
        feeds = {name: np.zeros((rows, *shape), dtype) for name, (dtype, shape) in self._layout.items()}
        feeds |= {"input_ids": ids, "logits_to_keep": np.array(1)}
        at_last = (np.arange(tokens) == tokens - 1)[None, :, None]
        for layer, array in patch.items():
            feeds |= {f"{PATCH}.{layer}": array[:, None], f"{PATCHED}.{layer}": at_last}
        try:
            logits, *states = self._session.run(["logits", *(f"{HIDDEN}.{layer}" for layer in layers)], feeds)
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise run_error(self._session, error) from error
        kept = [state[:, -1] if last else state for state in states]
        return np.stack(kept) if kept else np.empty((0, rows), np.float32), logits[:, 0]
