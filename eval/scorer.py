"""What is measured: a teacher, a student or a bundle, behind one interface. A bundle needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from dfssm.base import paths
from dfssm.base.errors import DfssmError
from dfssm.base.extras import Needs, require
from dfssm.model import PACKAGES
from dfssm.targets.bundle import TOKENIZER
from dfssm.targets.text import load_tokenizer, require_ends

BATCH = 8
"""Rows of one run, unless the caller says otherwise."""

CHUNK = 64
"""Tokens of one run whose logits are all wanted, likewise: 8 rows of 50,288 tokens are 103 MB."""


_GIVE = "another with --tokenizer"


class Scorer(Protocol):
    """A language model with its tokenizer. Token ids and logits are NumPy arrays; a state is the model's own.

    Attributes:
        kind: "teacher", "student" or "bundle". vocab_size: it knows the ids 0 to vocab_size - 1.
        tokenizer: `tokenizers.Tokenizer`. ends: ids of the tokens that end a text. end: the first of them, which
            separates documents. begin: of the token that begins a text, None where the config names none.
        max_batch: the most rows of a state.
    """

    kind: str
    vocab_size: int
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    end: int
    begin: int | None
    max_batch: int

    def new_state(self, batch: int) -> Any:
        """The state of `batch` sequences that have read nothing."""

    def select(self, state: Any, rows: Sequence[int]) -> Any:
        """A state of its own with these rows of `state`, in this order; a row may be given more than once."""

    def read(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """ids i64[B,T] -> logits f32[B,V] of the last token, and the new state. `state` is used up."""

    def logits(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """ids i64[B,T] -> logits f32[B,T,V] of all tokens, and the new state. `state` is used up."""


def log_probs(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """logits f32[...,V], targets i64[...] -> their log-probabilities f64[...], and whether each is the likeliest token.

    Exponentials are fp32, their sum and everything after it fp64.
    """
    top = logits.max(-1)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    total = np.exp(logits - top[..., None]).sum(-1, dtype=np.float64)
    return picked.astype(np.float64) - top - np.log(total), picked == top


def read_chunks(scorer: Scorer, ids: np.ndarray, state: Any, chunk: int = CHUNK) -> Iterator[tuple[slice, np.ndarray]]:
    """Read ids i64[B,T] after `state`, `chunk` of its columns at a time: their place, and logits f32[B,chunk,V]."""
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        logits, state = scorer.logits(np.ascontiguousarray(ids[:, part]), state)
        yield part, logits


def score(scorer: Scorer, ids: np.ndarray, targets: np.ndarray, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read ids i64[B,T] after `state`: `log_probs` of targets i64[B,T], each the token after that in ids."""
    found, likeliest = np.empty(ids.shape), np.empty(ids.shape, bool)
    for part, logits in read_chunks(scorer, ids, state):
        found[:, part], likeliest[:, part] = log_probs(logits, targets[:, part])
    return found, likeliest


def locate(path: str | Path, tokenizer: str | Path | None = None) -> tuple[str, Path, Path | None]:
    """The kind of model that lies at `path`, its own path, and its tokenizer.json: the one given, else that of the
    teacher or the one beside the student, and None for a bundle's own. DfssmError where one of them is not there.
    """
    kind, path = paths.find(path, "bundle", "teacher", "student")
    if tokenizer is None:
        if kind == "bundle":
            return kind, path, None
        tokenizer = (path if kind == "teacher" else path.parent) / TOKENIZER
    return kind, path, paths.file(tokenizer, "the tokenizer.json of the model with --tokenizer", TOKENIZER)


def packages(*kinds: str) -> Needs:
    """What models of these kinds take, to be measured."""
    return {} if set(kinds) <= {"bundle"} else PACKAGES


def open_scorer(path: str | Path, tokenizer: str | Path | None = None, device: str | None = None) -> Scorer:
    """Open what lies at `path`: a bundle, a teacher (checkpoint folder, or a file in it) or a student.

    Args: `tokenizer`: as `locate` takes it. `device`: a torch device for teacher and student, the CPU where it is not
        given.
    Raises DfssmError when there is no model, no tokenizer, or no end-of-text token, or torch is needed and missing.
    """
    kind, place, file = locate(path, tokenizer)
    if kind == "bundle":
        if device:
            raise DfssmError(f"{path} is a bundle, which runs where it was compiled for: leave out the device {device}")
        return EngineScorer(place, load_tokenizer(file, _GIVE) if file else None)
    require(packages(kind))
    from .torch_scorer import TorchScorer

    assert file  # of these kinds `locate` knows one
    return TorchScorer(kind, place, load_tokenizer(file, _GIVE), device)


class EngineScorer:
    """A bundle, run by the engine that ships it."""

    kind = "bundle"

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None):
        from dfssm.runtime import Engine

        self.engine = Engine.load(folder)
        self.vocab_size = self.engine.vocab_size
        self.tokenizer = tokenizer or self.engine.tokenizer
        self.ends = require_ends(self.engine.config.get("eos_token_id"), self.tokenizer)
        self.end = self.ends[0]
        self.begin = self.engine.config.get("bos_token_id")
        self.max_batch = self.engine.backend.max_batch  # a TensorRT engine is built for so many

    def new_state(self, batch: int) -> Any:
        return self.engine.new_state(batch)

    def select(self, state: Any, rows: Sequence[int]) -> Any:
        rows, new = list(rows), self.engine.new_state(len(rows))
        source, target = state.tensors, new.tensors
        for name, tensor in target.items():
            tensor[:] = source[name][rows]
        new.logits[:], new.tokens[:] = state.logits[rows], state.tokens[rows]
        new.recent[:] = state.recent[rows]
        return new

    def read(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        return self.engine.prefill(ids, state), state

    def logits(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        return self.engine.logits(ids, state), state
