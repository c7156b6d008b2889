"""Other programs that decode a model of the same shape, timed in the same rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfssm.base.errors import DfssmError

from .peer import Peer

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
