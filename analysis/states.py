"""The last token's hidden states of all prompts: read once, kept as safetensors, and read back by every study."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dfssm.base.errors import DfssmError
from dfssm.base.files import write_file
from dfssm.base.numbers import require_memory

from .prompts import Prompts
from .subject import Subject

_ROWS = 32  # of a run
_VERSION = "1"

Progress = Callable[[int, int], None]


def collect(subject: Subject, prompts: Prompts, folder: Path, progress: Progress) -> np.ndarray:
    """f32[L+1,N,D], layer 0 the embedding. From `folder` where they are there: of the same weights and tokens."""
    shape = (subject.n_layer + 1, len(prompts), subject.config["d_model"])
    require_memory("hidden states", 4 * int(np.prod(shape)), "give fewer prompts")
    digest = hashlib.sha256(f"{_VERSION} {subject.key} {shape}".encode())
    for ids in prompts.ids:
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    path = folder / f"states-{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            states = safetensors.numpy.load(path.read_bytes())["states"]
            if states.shape == shape and states.dtype == np.float32:
                progress(len(prompts), len(prompts))
                return states
        except (SafetensorError, KeyError, OSError):
            pass  # damaged: read again
    states = np.empty(shape, np.float32)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts.ids[i]))  # those of one length run together
    for start in range(0, len(order), _ROWS):
        some = order[start : start + _ROWS]
        try:
            states[:, some] = subject.model.hidden([prompts.ids[i] for i in some]).states
        except DfssmError as error:
            raise DfssmError(f"{subject.name}: {error}") from None
        progress(start + len(some), len(order))
    write_file(path, safetensors.numpy.save({"states": states}), parents=True)
    return states
