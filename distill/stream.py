"""A data set of Hugging Face, read while it is trained on -> training windows: `hf:NAME[:CONFIG][@SPLIT]`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dfssm.base.errors import DfssmError, reason
from dfssm.base.extras import require
from dfssm.model.text import FIELD, batches, text_of

from . import PREFIX
from .data import TOKEN, encode

if TYPE_CHECKING:
    from datasets import IterableDataset
    from tokenizers import Tokenizer

_SOURCE = re.compile(PREFIX + r"(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")
_BLOCK = 1024  # windows shuffled at a time


class StreamedWindows:
    """Like `Windows`, an endless sequence of training windows; this one's text is never whole on this machine.

    The documents of the stream are split between the `world` ranks, so another number of ranks sees them in another
    order. A rank joins its documents and cuts them into windows of tokens + 1 ids that overlap in one: every token is
    predicted once an epoch. `seed` orders the shards of each epoch, and the windows within blocks of at least 1024:
    unlike a shuffle buffer, whose contents would have to be saved, a block is soon read again when a run is resumed.

    `held_out`, u32[n], are the tokens of the first documents of the stream, the same on every rank; where one of
    them comes again it is not trained on.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        end: int,
        vocab_size: int,
        tokens: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        held_out: int = 1000,
    ):
        """Open hf:NAME[:CONFIG][@SPLIT], split "train" if not given, and read `held_out` documents.

        Raises DfssmError if `datasets` is not installed, if it cannot open the data set, if that has no column
        `text` or no more than the held-out documents, or if a token does not fit `vocab_size`.
        """
        self.tokens, self.seed, self.rank, self.world = tokens, seed, rank, world
        self._encode = lambda texts: encode(texts, tokenizer, end, vocab_size)
        dataset = _open(source)
        first = list(islice(_texts(dataset, source), held_out + 1))
        if len(first) <= held_out:
            raise DfssmError(f"{source}: has {len(first)} documents, {held_out} are held out; choose a larger one")
        first = list(filter(None, first[:held_out]))
        self.held_out = self._encode(first) if first else np.empty(0, TOKEN)
        self._documents = _Documents(source, dataset, frozenset(first), seed, rank, world)
        self._rest, self._block, self._taken = np.empty(0, TOKEN), 0, 0
        self._windows = np.empty((0, tokens + 1), TOKEN)
        self._start = self._position()

    def take(self, count: int) -> np.ndarray:
        """This rank's next `count` windows, i64[count, tokens + 1]."""
        return np.stack([self._next() for _ in range(count)]).astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank, of Python's own types: where its block began, and windows taken from that."""
        return self._start | {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the block it lies in is read again. Raises DfssmError if it is another rank's."""
        if (state["rank"], state["world"]) != (self.rank, self.world):
            raise DfssmError(
                f"the position in the stream is that of rank {state['rank']} of {state['world']}, this is rank "
                f"{self.rank} of {self.world}; resume with as many ranks"
            )
        self._documents.load_state_dict(state["documents"])
        self._rest, self._block = np.array(state["rest"], TOKEN), state["block"]
        self._read_block()
        self._taken = state["taken"]

    def _next(self) -> np.ndarray:
        if self._taken == len(self._windows):
            self._read_block()
        self._taken += 1
        return self._windows[self._taken - 1]

    def _position(self) -> dict[str, Any]:
        """From where the next block is read."""
        return {
            "rank": self.rank,
            "world": self.world,
            "documents": self._documents.state_dict(),
            "rest": self._rest.tolist(),
            "block": self._block,
        }

    def _read_block(self) -> None:
        self._start = self._position()
        parts, size = [self._rest], len(self._rest)
        while size <= _BLOCK * self.tokens:
            parts.append(self._encode(self._documents.read()))
            size += len(parts[-1])
        ids = np.concatenate(parts)
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.tokens + 1)[:: self.tokens]
        order = np.random.default_rng((self.seed, self.rank, self._block)).permutation(len(windows))
        self._windows, self._rest = windows[order], ids[len(windows) * self.tokens :]
        self._block, self._taken = self._block + 1, 0


class _Documents:
    """A rank's documents of a stream, epoch after epoch, without those held out; the position can be saved."""

    _batches: Iterator[list[str]]

    def __init__(
        self, source: str, dataset: IterableDataset, held_out: frozenset[str], seed: int, rank: int, world: int
    ):
        from datasets.distributed import split_dataset_by_node

        # Not skip(): split by rank, that skips the first documents of each rank's part, which are others.
        self._held_out, self._source, self._seed = held_out, source, seed
        self._dataset = split_dataset_by_node(dataset, rank, world)
        self.load_state_dict({"epoch": 0, "dataset": None})

    def read(self) -> list[str]:
        """The next batch of documents, at least one, all of the same epoch."""
        for _ in range(2):
            if found := next(self._batches, None):
                self._state = self._dataset.state_dict()
                return found
            self.load_state_dict({"epoch": self._epoch + 1, "dataset": None})
        raise DfssmError(f"{self._source}: has no text but what is held out; choose a larger one or fewer ranks")

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "dataset": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._state = state["epoch"], state["dataset"]
        # By this number the library orders the shards; at 0 it would leave them as they are.
        self._dataset.set_epoch(int(np.random.default_rng((self._seed, self._epoch)).integers(1, 1 << 31)))
        self._dataset.load_state_dict(self._state)
        texts = _texts(self._dataset, self._source)
        self._batches = batches(text for text in texts if text and text not in self._held_out)


def _open(source: str) -> IterableDataset:
    parts = _SOURCE.fullmatch(source)
    if not parts:
        raise DfssmError(f"{source}: is no name of a data set; give {PREFIX}NAME[:CONFIG][@SPLIT]")
    require({"distill": ["datasets"]})
    import datasets

    with _one_line(source):
        dataset = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"] or "train", streaming=True)
        columns = list(next(iter(dataset)))
    if FIELD not in columns:
        raise DfssmError(f"{source}: has no column {FIELD!r} but {', '.join(columns)}; choose a data set with one")
    return dataset.select_columns([FIELD])  # the others are not decoded


def _texts(dataset: IterableDataset, source: str) -> Iterator[str]:
    with _one_line(source):
        for row in dataset:
            yield text_of(row, source).strip()


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """What the library and its readers raise, which has no narrower class, as a DfssmError."""
    try:
        yield
    except DfssmError:
        raise
    except Exception as error:
        why = "it is empty" if isinstance(error, StopIteration) else reason(error)
        raise DfssmError(f"{source}: cannot be read ({why}); check its name, its split and the network") from None
