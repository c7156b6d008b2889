"""The recurrent state of a batch of sequences: all that a Mamba-2 model remembers, of fixed size at any
length.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dfssm.base import paths, tensorfile
from dfssm.base.errors import DfssmError, reason
from dfssm.base.files import write_file
from dfssm.base.numbers import require_memory, require_whole
from dfssm.base.reading import read_file

from .rows import RECENT, Rows

FORMAT = "dfssm-state"
VERSION = 1

_DTYPES = tuple(map(np.dtype, ("float32", "float16", "int8", "uint8", "int64")))  # of the tensors in a state file

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype and shape of one row


class State:
    """State of `batch` sequences of one model, and the logits of the last token each of them has read.

    A run that is interrupted half-way leaves it broken: it is then refused, whatever it is asked for, until `reset` or
    `copy_from`. A run that ended is all there, also when Ctrl-C came meanwhile.

    Attributes:
        tensors: name of the graph's input -> array [batch, ...], what the engine starts from and leaves; call `push`
            after writing to them.
        logits: f32[batch, vocab], of the last token; a device that has them copies them when they are asked for.
        tokens: i64[batch], how many tokens each row has read.
        recent: i64[batch, RECENT], the last of them, -1 where there were fewer: text goes on where it was cut.
        model: identity of the model: sha256 of its weights as they lie in the bundle. An engine refuses any other's.
    """

    def __init__(
        self,
        model: str,
        tensors: dict[str, np.ndarray],
        logits: np.ndarray,
        tokens: np.ndarray,
        recent: np.ndarray | None = None,
    ):
        self.model, self._tensors, self._logits = model, tensors, logits
        self.rows = Rows(tokens, recent)
        self.tokens, self.recent = self.rows.tokens, self.rows.recent
        # Of the engine that ran it last: itself, and its backend's pool of these rows.
        self.engine: Any = None
        self.pool: Any = None
        # Of a row: the state whose memory it shares. `span`: where it lies in the rows of that.
        self._whole: State | None = None
        self.span = range(len(tokens))

    def __repr__(self) -> str:
        return f"<State of {self.batch} sequences: {self.tokens.tolist()} tokens read, {self.nbytes / 1e6:.1f} MB>"

    @classmethod
    def zeros(cls, model: str, layout: Layout, vocab: int, batch: int) -> State:
        """The state before the first token, `batch` rows of `layout`."""
        require_whole("batch", batch, 1)
        row = vocab * 4 + sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        require_memory(f"the state of {batch:,} sequences", batch * row, "run fewer at once")
        tensors = {name: np.zeros((batch, *shape), dtype) for name, (dtype, shape) in layout.items()}
        return cls(model, tensors, np.zeros((batch, vocab), np.float32), np.zeros(batch, np.int64))

    @property
    def whole(self) -> State:
        """Of a row the state that it is of, else this one."""
        return self._whole or self

    def require_sound(self) -> None:
        """DfssmError where a run of a row did not come to its end."""
        self.rows.require_sound(self.span)

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        self.pull()
        return MappingProxyType(self._tensors)  # sessions hold the arrays' addresses: none is to be replaced

    @property
    def logits(self) -> np.ndarray:
        if self.whole.pool is not None:
            self.whole.pool.pull_logits()
        return self._logits

    def pull(self) -> None:
        """Bring the arrays up to date with a device that runs them; nothing to do where they run in place."""
        if self.whole.pool is not None:
            self.whole.pool.pull()

    def push(self) -> None:
        """The arrays were written: the next run starts from them."""
        if self.whole.pool is not None:
            self.whole.pool.push()

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent state alone, all rows."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def layout(self) -> Layout:
        return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in self._tensors.items()}

    def row(self, index: int) -> State:
        """Row `index` as a state of batch 1, sharing this one's memory: what runs on it changes this one."""
        require_whole(f"row of a state of batch {self.batch}", index, 0, self.batch - 1)
        at = slice(index, index + 1)
        tensors = {name: tensor[at] for name, tensor in self._tensors.items()}
        row = State(self.model, tensors, self._logits[at], self.tokens[at], self.recent[at])
        row._whole, row.rows, row.span = self.whole, self.rows, self.span[at]
        return row

    def clone(self) -> State:
        """An independent copy, to come back to with `copy_from`."""
        self.require_sound()
        tensors = {name: tensor.copy() for name, tensor in self.tensors.items()}
        return State(self.model, tensors, self.logits.copy(), self.tokens.copy(), self.recent.copy())

    __copy__ = clone

    def __reduce__(self) -> tuple[type[State], tuple[Any, ...]]:
        """Pickled, or deeply copied, a state is its arrays; the engine binds it again at the next run."""
        self.require_sound()
        return State, (self.model, dict(self.tensors), self.logits, self.tokens, self.recent)

    def copy_from(self, other: State) -> None:
        """Become `other`, in place. A single row is copied to every row: a prefix shared by a batch."""
        require_model(other, self.model, self.layout, self._logits.shape[1])
        other.require_sound()
        if other.batch not in (1, self.batch):
            raise DfssmError(f"cannot copy a state of batch {other.batch} into one of batch {self.batch}")
        source, arrays = other._arrays(), self._arrays()
        self.rows.begin(self.span)
        for name, array in arrays.items():
            np.copyto(array, source[name])
        np.copyto(self.recent, other.recent)
        self.push()
        self.rows.end(self.span)

    def reset(self) -> None:
        """Forget everything: the state before the first token."""
        self.rows.begin(self.span)
        for row in self.span:
            self.rows.reset(row)
            if self.whole.pool is not None:
                self.whole.pool.reset(row)
        if self.whole.pool is None:
            for array in (*self._tensors.values(), self._logits):
                array.fill(0)
        self.rows.end(self.span)

    def to_bytes(self) -> bytes:
        """The state as `save` writes it: equal states are equal bytes."""
        self.require_sound()
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays().items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "model": self.model}
        metadata |= {"recent": json.dumps(self.recent.tolist())}
        file = io.BytesIO(safetensors.numpy.save(arrays, metadata))
        tensorfile.order(file)
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the state to `path`, a .safetensors file: whole, or not at all."""
        write_file(path, self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, name: str | Path = "what was given") -> State:
        """The state that `to_bytes` wrote. DfssmError, about `name`, when `data` is not one, or cut off or damaged."""
        try:
            arrays = {key: np.require(array, None, "W") for key, array in safetensors.numpy.load(data).items()}
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                found = (
                    f"{metadata['format']} version {metadata.get('version')}" if "format" in metadata else "no state"
                )
                raise ValueError(f"it is {found}, not {FORMAT} {VERSION}")
            # A file of before there were recent tokens has none: what follows is a text of its own.
            recent = json.loads(metadata["recent"]) if "recent" in metadata else None
            for key, array in arrays.items():
                if array.dtype not in _DTYPES:
                    raise ValueError(f"tensor '{key}' is {array.dtype}")
            logits, tokens = arrays.pop("logits"), arrays.pop("tokens")
            state = cls(metadata["model"], arrays, logits, tokens, None if recent is None else np.array(recent))
            if flaw := state.flaw():
                raise ValueError(flaw)
            return state
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DfssmError(f"{name} is not a state that this dfssm can read ({error}): save it again") from None

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read a state that `save` wrote. DfssmError when the file is not one, or is cut off or damaged."""
        path = paths.file(path, "a file that a state was saved to")
        try:
            data = read_file(path)
        except OSError as error:
            raise DfssmError(f"cannot read the state {path}: {reason(error)}") from None
        return cls.from_bytes(data, path)

    def flaw(self) -> str:
        """Why no engine can run it, where it was made by hand or damaged; "" where nothing is wrong."""
        arrays = {**self._tensors, "logits": self.logits, "tokens": self.tokens, "recent": self.recent}
        for name, array in arrays.items():
            # Sessions write to the memory by its address.
            if not isinstance(array, np.ndarray) or not array.flags.carray:
                return f"{name} is no array in one piece that can be written to"
        tokens, logits, recent = self.tokens, self.logits, self.recent
        if tokens.ndim != 1 or logits.ndim != 2 or any(array.shape[:1] != tokens.shape for array in arrays.values()):
            return "its tensors are not of one batch"
        if tokens.dtype != np.int64 or not len(tokens) or not 0 <= tokens.min() <= tokens.max() < 1 << 62:
            return "its numbers of tokens are none"
        if logits.dtype != np.float32:
            return f"its logits are {logits.dtype}"
        if recent.shape[1:] != (RECENT,) or recent.dtype != np.int64:
            return "its recent tokens are not those of its rows"
        if not -1 <= recent.min() <= recent.max() < logits.shape[1]:
            return "its recent tokens are none of its model"
        return ""

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**self.tensors, "logits": self.logits, "tokens": self.tokens}


def require_model(state: State, model: str, layout: Layout, vocab: int) -> None:
    """DfssmError unless `state` was made by the model `model` with states stored as in `layout`."""
    if flaw := state.flaw():
        raise DfssmError(f"the state cannot be run ({flaw}): make one with new_state")
    if state.model != model:
        raise DfssmError(
            f"the state is of a bundle with other weights or --isa (sha256 {state.model[:12]}, here {model[:12]}): "
            "use the bundle that it was made with"
        )
    differing = next((name for name in {**layout, **state.layout} if layout.get(name) != state.layout.get(name)), None)
    if differing is not None:
        found, wanted = state.layout.get(differing), layout.get(differing)
        raise DfssmError(
            f"{differing} of the state is {describe(found)}, this bundle has {describe(wanted)}: "
            "use the bundle that it was made with"
        )
    if state._logits.shape[1] != vocab:
        raise DfssmError(f"the state has logits of {state._logits.shape[1]} tokens, this bundle of {vocab}")


def describe(entry: tuple[np.dtype, tuple[int, ...]] | None) -> str:
    """A state's dtype and shape of one row, in words."""
    return "missing" if entry is None else f"{np.dtype(entry[0]).name}{list(entry[1])}"
