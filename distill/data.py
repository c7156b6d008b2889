"""Text -> a token file -> training windows, the same ones in the same order for any number of ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dfssm.base import paths
from dfssm.base.endings import END_OF_TEXT
from dfssm.base.errors import DfssmError
from dfssm.base.files import new_folder, writing
from dfssm.base.jsonfile import json_object
from dfssm.model.text import batches, documents, text_files
from dfssm.targets.bundle import TOKENIZER
from dfssm.targets.text import document, encode_documents, end_tokens, load_tokenizer

from .held_out import cut_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dfssm.model.config import Mamba2Config

    from .distributed import Ranks

TOKEN = np.dtype("<u4")
_TOKENS, _RECORD = "tokens.u32", "tokens.json"
_READ = 64  # characters read for each token of a sample


@dataclass(frozen=True)
class Tokens:
    """Two token streams u32[n], mapped from a file: `train`, and `held_out`, the last share of each text file."""

    train: np.ndarray
    held_out: np.ndarray


class Source(Protocol):
    """Where windows come from, i64[count, tokens + 1], and the position in it."""

    def take(self, count: int) -> np.ndarray: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Windows:
    """An endless sequence of training windows over a token stream; window k is a function of `seed` and k alone.

    Epoch by epoch the stream ids u32[n] is cut, from a random offset on, into windows of tokens + 1 ids that overlap
    in one: every token is predicted once, but for fewer than 2 * tokens at the ends. Their order is random. Of each
    batch of the `world` ranks, rank r takes the r-th part: at one global batch, any number of ranks sees the same
    windows in every step. Raises DfssmError if the stream is shorter than two windows.
    """

    def __init__(self, ids: np.ndarray, tokens: int, seed: int, rank: int = 0, world: int = 1):
        self.ids, self.tokens, self.seed, self.rank, self.world = ids, tokens, seed, rank, world
        self.per_epoch = (len(ids) - tokens) // tokens
        _require_windows(len(ids), tokens)
        self._position = 0  # windows taken by all ranks together
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def __getitem__(self, k: int) -> np.ndarray:
        """Window k, i64[tokens + 1]."""
        epoch, i = divmod(k, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng((self.seed, epoch))
            offset = random.integers(self.tokens)
            self._epoch, self._starts = epoch, offset + random.permutation(self.per_epoch) * self.tokens
        start = self._starts[i]
        return self.ids[start : start + self.tokens + 1].astype(np.int64)

    def take(self, count: int) -> np.ndarray:
        """This rank's next `count` windows, i64[count, tokens + 1]."""
        first = self._position + self.rank * count
        self._position += self.world * count
        return np.stack([self[k] for k in range(first, first + count)])

    def state_dict(self) -> dict[str, int]:
        """The position; the same on every rank."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]


def open_tokenizer(path: Path, config: Mamba2Config) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer of a teacher, and the ids that end a text; the first separates documents. DfssmError where it is
    not the teacher's, or nothing ends a text.
    """
    give, vocab = "the teacher's own with --tokenizer", config.vocab_size
    file = paths.file(path, give, TOKENIZER)
    tokenizer = load_tokenizer(file, give, vocab)
    ends = end_tokens(config.eos_token_id, tokenizer) or (vocab,)
    if max(ends) >= vocab:
        raise DfssmError(f"{file}: has no {END_OF_TEXT} among the teacher's {vocab} tokens")
    return tokenizer, ends


def tokenize(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    end: int,
    vocab_size: int,
    held_out: float,
    folder: Path,
    tokens: int = 1,
    progress: Callable[[int], None] = lambda size: None,
) -> Tokens:
    """Tokenise files into a token file in the folder `folder`, which is new unless it is of the same text; map it.

    Every document is followed by the token `end`; the last `held_out` share of each file's tokens is kept apart. In
    memory is one batch of documents. `progress` gets the bytes of text done since its last call. Of several ranks
    that share `folder` one calls this, and the others `open_tokens` once it has returned. Raises DfssmError, and leaves
    what was in `folder`, if the text is shorter than two windows of `tokens`, if a token does not fit `vocab_size`, if
    `folder` cannot be written, or as `text_files` and `documents`.
    """
    files = text_files(paths)
    source = {
        "files": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "end": end,
        "special_tokens": "template",  # files of before that rule have none but `end`
        "vocab_size": vocab_size,
        "held_out": held_out,
    }
    if (_read_record(folder) or {}).get("source") != source:

        def encoded(file: Path) -> Iterator[np.ndarray]:
            for batch in batches(documents(file)):
                yield encode(batch, tokenizer, end, vocab_size)
                progress(sum(len(text.encode()) for text in batch))

        with new_folder(folder, replace=True, parents=True) as draft, writing(folder):
            train, held = _write(draft / _TOKENS, map(encoded, files), held_out)
            if not train + held:
                raise DfssmError(f"{', '.join(map(str, paths))}: there is no text to train on; give --data more")
            _require_windows(train, tokens)
            (draft / _RECORD).write_text(json.dumps({"source": source, "train": train, "held_out": held}))
    return open_tokens(folder)


def sample(
    paths: Sequence[Path], tokenizer: Tokenizer, end: int, vocab_size: int, tokens: int, window: int
) -> np.ndarray:
    """Windows i64[n,window] of files, about `tokens` tokens, spread evenly over the text. Nothing is written.

    Of each file no more is read than its share of 64 characters for each token wanted. Raises DfssmError if the text
    has less than two windows, and as `tokenize`.
    """
    files = text_files(paths)
    share = max(1, _READ * tokens // len(files))
    texts = chain.from_iterable(_beginning(documents(file), share) for file in files)
    parts = [encode(batch, tokenizer, end, vocab_size) for batch in batches(texts)]
    ids = np.concatenate(parts) if parts else np.empty(0, TOKEN)
    if len(ids) < 2 * window:
        raise DfssmError(
            f"{', '.join(map(str, paths))}: has {len(ids):,} tokens, two windows of {window:,} need {2 * window:,}; "
            "give more --data or a smaller --window"
        )
    return cut_windows(ids, window, tokens)[:, :-1]


def _beginning(texts: Iterable[str], most: int) -> Iterator[str]:
    """Texts up to `most` characters together."""
    for text in texts:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            return


def open_files(
    paths: Sequence[Path], folder: Path, ranks: Ranks, *, tokens: int, seed: int, **options
) -> tuple[Windows, Tokens]:
    """The training windows of this rank, and all tokens. The first rank calls `tokenize` with these `options`."""
    if ranks.first:
        tokenize(paths, folder=folder, tokens=tokens, **options)
    ranks.barrier()
    found = open_tokens(folder)
    return Windows(found.train, tokens, seed, ranks.rank, ranks.world), found


def open_tokens(folder: Path) -> Tokens:
    """Map the token file that `tokenize` left in `folder`. Raises DfssmError if there is none, or not all of it."""
    record = _read_record(folder)
    if record is None:
        raise DfssmError(f"{folder}: holds no whole {_TOKENS}; all ranks need the same folder, or tokenise again")
    ids = np.memmap(folder / _TOKENS, TOKEN, mode="r")
    return Tokens(ids[: record["train"]], ids[record["train"] :])


def encode(texts: list[str], tokenizer: Tokenizer, end: int, vocab_size: int) -> np.ndarray:
    """The tokens of texts, u32[n], each as a document that `end` ends. Raises DfssmError if one is >= vocab_size."""
    ids = np.concatenate([np.array(document(found, end), TOKEN) for found in encode_documents(texts, tokenizer)])
    if ids.max() >= vocab_size:
        raise DfssmError(
            f"the tokenizer makes token {ids.max()}, the teacher has {vocab_size}: "
            "give the teacher's own with --tokenizer"
        )
    return ids


def _require_windows(count: int, tokens: int) -> None:
    if count < 2 * tokens:
        raise DfssmError(
            f"the training text has {count:,} tokens, two windows of {tokens:,} need {2 * tokens:,}; "
            "give more --data or fewer --tokens"
        )


def _write(path: Path, files: Iterable[Iterable[np.ndarray]], held_out: float) -> tuple[int, int]:
    """Tokens of files, given in parts -> one file, first those to train on and then those held out; their counts."""
    with path.open("w+b") as train, TemporaryFile(dir=path.parent) as held:
        for parts in files:
            start = train.tell()
            for ids in parts:
                train.write(ids.tobytes())
            count = (train.tell() - start) // TOKEN.itemsize
            cut = start + (count - round(held_out * count)) * TOKEN.itemsize
            train.seek(cut)
            shutil.copyfileobj(train, held)
            train.seek(cut)
            train.truncate()
        counts = train.tell() // TOKEN.itemsize, held.tell() // TOKEN.itemsize
        held.seek(0)
        shutil.copyfileobj(held, train)
    return counts


def _read_record(folder: Path) -> dict | None:
    """What `tokenize` wrote down of the token file in `folder`; None where that is missing or not whole."""
    record = json_object(folder / _RECORD)
    try:
        size = (folder / _TOKENS).stat().st_size
        return record if size == (record["train"] + record["held_out"]) * TOKEN.itemsize else None
    except (OSError, KeyError, TypeError):
        return None
