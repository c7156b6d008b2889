"""Files of text -> one stream of tokens, its documents separated by the end-of-text token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.model.text import batches, documents, text_files
from dfssm.targets.text import document, encode_documents

from .scorer import Scorer


@dataclass(frozen=True)
class Text:
    """ids i64[n], at least two; ends i64[n]: UTF-8 bytes of the documents up to the end of each token."""

    ids: np.ndarray
    ends: np.ndarray

    @property
    def scored_bytes(self) -> int:
        """Bytes of all tokens but the first, which nothing predicts."""
        return int(self.ends[-1] - self.ends[0])


def read_text(paths: Sequence[Path], scorer: Scorer, tokens: int | None = None) -> Text:
    """Tokenise the documents of files and folders as `documents` and `text_files` find them, those that train too.

    Each document is followed by `scorer.end`. `tokens`: only so many tokens after the first. Raises DfssmError when a
    file cannot be read, the text has fewer than two tokens, or the model lacks one of them.
    """
    ids: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    size, missing = 0, np.inf if tokens is None else tokens + 1
    for batch in batches(chain.from_iterable(map(documents, text_files(paths)))):
        for text, found in zip(batch, encode_documents(batch, scorer.tokenizer, offsets=True), strict=True):
            lengths = _byte_lengths(text)
            ids.append(np.array(document(found, scorer.end), np.int64))
            ends.append(size + lengths[[*(end for _, end in found.offsets[: len(ids[-1]) - 1]), -1]])
            size += lengths[-1]
            missing -= len(ids[-1])
        if missing <= 0:
            break
    length = sum(map(len, ids))
    if length < 2:
        raise DfssmError(f"{', '.join(map(str, paths))}: there is no text to score; give --data more")
    keep = slice(None if tokens is None else tokens + 1)
    read = Text(np.concatenate(ids)[keep], np.concatenate(ends)[keep])
    if read.ids.max() >= scorer.vocab_size:
        raise DfssmError(
            f"the tokenizer makes token {read.ids.max()}, the model has {scorer.vocab_size}: "
            "give the model's own with --tokenizer"
        )
    return read


def _byte_lengths(document: str) -> np.ndarray:
    """UTF-8 bytes of the first 0, 1, ... characters: i64[characters + 1]."""
    codes = np.frombuffer(document.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800).astype(np.int64) + (codes >= 0x10000)
    return np.concatenate([[0], sizes.cumsum()])
