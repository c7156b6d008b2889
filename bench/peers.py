"""Other programs that decode a model of the same shape, timed in the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfssm.base.errors import DfssmError


@dataclass
class Peer:
    """A model of random weights, opened. Both functions begin with a state that has read nothing.

    `decode(n)` and `prefill(n)`: seconds of n steps, of reading a prompt of n tokens. `options`: how it was built and
    opened, in a line. `close` ends it. What they compute is checked to be finite, and fails where it is not.
    """

    decode: Callable[[int], float]
    prefill: Callable[[int], float]
    options: str
    close: Callable[[], object] = lambda: None


PEERS = ("stock-ort", "llama.cpp")


def open_peer(name: str, config: dict[str, Any], folder: Path, threads: int) -> dict[str, Peer]:
    """Build the variants of a peer in `folder`, by the name of each. `config`: by the keys of a manifest."""
    if name == "stock-ort":
        from .stock_ort import open_best

        return {"stock-ort, 8-bit head": open_best(config, folder, threads, head_bits=8)}
    if name == "llama.cpp":
        from . import llama_cpp

        return {f"llama.cpp {kind}": llama_cpp.open_peer(config, folder, threads, kind) for kind in llama_cpp.KINDS}
    raise DfssmError(f"unknown peer '{name}': choose {' or '.join(PEERS)}")
