"""The teacher's likeliest tokens on disk: distilled from any number of times, the teacher is run once.

A folder holds topk.json, what the files are of, and shards topk-000000.npy of as many windows as 16 MB hold. A shard is
an array of records, one a window, of T tokens: `key`, a digest of the window's ids; `ids` u16 or u32 [T,k]; `log_q`
fp16 [T,k+1], the log-probabilities of those tokens and, last, of all others together.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dfssm.base.errors import DfssmError, reason
from dfssm.base.files import collect, write_file
from dfssm.base.reading import read_text
from dfssm.model.teacher import Mamba2LM

from .data import Windows
from .distributed import Ranks

CHUNK = 512
"""Tokens whose logits exist at a time: 100 MB of fp32 at 50 k entries."""

_RECORD = "topk.json"
_SHARD = 1 << 24  # bytes; what an interruption loses at most


class TopKTarget:
    """The target of a batch, as objective.TeacherLogits, of k tokens and all others as one.

    ids i64[n,k]; log_q[n,k+1], of which the last is of the others: -inf where k is the whole vocabulary.
    """

    def __init__(self, ids: Tensor, log_q: Tensor):
        self.ids, self.log_q = ids, log_q

    def divergence(self, piece: slice, log_p: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) summed over the tokens of `piece`, and its gradient by the student's logits. There is
        no other temperature: what the others would have at it is not known.

        That of a token among the k is p - q; another's is its p, less its share of the others' q.
        """
        ids, log_q = self.ids[piece], F.log_softmax(self.log_q[piece].to(log_p.dtype), dim=-1)  # they were rounded
        log_q, log_q_rest = log_q[:, :-1], log_q[:, -1:]
        q, gradient = log_q.exp(), log_p.exp()
        kl = (q * (log_q - log_p.gather(1, ids))).sum(dtype=torch.float64)
        if ids.shape[1] < log_p.shape[1]:
            others = log_p.scatter(1, ids, -torch.inf)
            log_p_rest, q_rest = others.logsumexp(1, keepdim=True), log_q_rest.exp()
            kl += (q_rest * (log_q_rest - log_p_rest)).sum(dtype=torch.float64)
            gradient -= others.sub_(log_p_rest).exp_().mul_(q_rest)
        return kl, gradient.scatter_add_(1, ids, -q)


class TopK:
    """What `write_topk` left in `folder`. Raises DfssmError if there is nothing, or a file is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[np.ndarray] = []
        self._places: dict[int, tuple[int, int]] = {}  # key of a window -> shard, row
        if _read_record(folder) is None:
            raise DfssmError(f"{folder}: holds no {_RECORD}; precompute the teacher's logits")
        for file in sorted(folder.glob("topk-*.npy")):
            try:
                self._shards.append(np.load(file, mmap_mode="r"))
            except (OSError, ValueError) as error:
                raise DfssmError(f"{file}: cannot be read ({error}); remove it and precompute it anew") from None
            for row, key in enumerate(self._shards[-1]["key"].tolist()):
                self._places[key] = len(self._shards) - 1, row

    def __len__(self) -> int:
        """Different windows."""
        return len(self._places)

    def target(self, windows: Tensor) -> TopKTarget:
        """windows i64[B,T+1] -> their target, on the same device. Raises DfssmError if one is not there."""
        places = [place for window in windows.cpu().numpy() if (place := self._places.get(_key(window)))]
        if len(places) < len(windows):
            raise DfssmError(
                f"{self.folder}: lacks a window of this run; its logits are of another text, --seed or --tokens, or of "
                "fewer windows: precompute them anew"
            )
        rows = [self._shards[shard][row] for shard, row in places]
        ids = np.stack([row["ids"] for row in rows]).astype(np.int64)
        log_q = np.stack([row["log_q"] for row in rows])
        return TopKTarget(*(torch.from_numpy(array).flatten(0, 1).to(windows.device) for array in (ids, log_q)))


@torch.no_grad()
def write_topk(
    teacher: Mamba2LM,
    windows: Windows,
    count: int,
    k: int,
    folder: Path,
    batch: int = 8,
    bf16: bool = False,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Store the teacher's `k` likeliest next tokens at each token of windows 0 to count - 1, `batch` at a time.

    Of `world` ranks that share `folder` each writes its part. Whole shards that are there stay: after an interruption
    the same call goes on. `bf16`: products are of that type, as those of a run in bf16; it may differ from call to
    call, for what is faster is measured. `progress` gets the tokens that came since its last call. Raises DfssmError if
    `k` does not fit the vocabulary, if `folder` holds logits of another teacher or shape, or if it cannot be written.
    """
    vocab, tokens = teacher.config.vocab_size, len(windows[0]) - 1
    if not 1 <= k <= vocab:
        raise DfssmError(f"k is {k}; give 1 to {vocab}, the teacher's tokens")
    record = {"k": k, "tokens": tokens, "vocab_size": vocab, "teacher": _digest(teacher)}
    collect(folder)
    found = _read_record(folder) or {}
    for name, value in record.items():
        if found and found.get(name) != value:
            raise DfssmError(
                f"{folder}: holds logits with {name} {found.get(name)}, not {value}; remove it or choose another folder"
            )
    if not found:
        write_file(folder / _RECORD, json.dumps(record), parents=True)
    dtype = _window(tokens, k, vocab)
    size = max(1, _SHARD // dtype.itemsize)
    for number in range(rank, -(-count // size), world):
        file, wanted = folder / f"topk-{number:06d}.npy", range(number * size, min((number + 1) * size, count))
        if _keys(file)[: len(wanted)] == [_key(windows[i]) for i in wanted]:
            progress(len(wanted) * tokens)
            continue
        shard = np.empty(len(wanted), dtype)
        for begin in range(0, len(shard), batch):
            ids = np.stack([windows[i] for i in wanted[begin : begin + batch]])
            part = shard[begin : begin + batch]
            part["key"] = [_key(window) for window in ids]
            part["ids"], part["log_q"] = _likeliest(teacher, ids[:, :-1], k, bf16)
            progress(part["ids"].size // k)
        content = io.BytesIO()
        np.save(content, shard)
        write_file(file, content.getvalue())


def precompute(
    teacher: Mamba2LM, windows: Windows, count: int, k: int, folder: Path, batch: int, bf16: bool, ranks: Ranks
) -> TopK:
    """What `write_topk` writes of the first `count` windows, all ranks together, behind a progress bar."""
    total, hide = count * windows.tokens // ranks.world, None if ranks.first else True
    with tqdm(total=total, desc="teacher", unit="tok", unit_scale=True, mininterval=1.0, disable=hide) as bar:
        write_topk(teacher, windows, count, k, folder, batch, bf16, ranks.rank, ranks.world, bar.update)
    ranks.barrier()
    return TopK(folder)


def _likeliest(teacher: Mamba2LM, ids: np.ndarray, k: int, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """ids i64[B,T] -> the likeliest tokens i64[B,T,k]; log-probabilities f32[B,T,k+1], theirs and the others'."""
    device = teacher.embedding.weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        hidden = teacher.norm_f(teacher.hidden_states(torch.from_numpy(ids).to(device))[0]).flatten(0, 1)
        likeliest, values = [], []
        for part in hidden.split(CHUNK):
            log_q = F.log_softmax(teacher.head.project(part).float(), dim=-1)
            top = log_q.topk(k)
            rest = log_q.scatter_(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
            likeliest.append(top.indices.cpu())
            values.append(torch.cat([top.values, rest], 1).cpu())
    return tuple(torch.cat(parts).unflatten(0, ids.shape).numpy() for parts in (likeliest, values))


def _window(tokens: int, k: int, vocab_size: int) -> np.dtype:
    """The record of a window."""
    kind = "<u2" if vocab_size <= 1 << 16 else "<u4"
    return np.dtype([("key", "<u8"), ("ids", kind, (tokens, k)), ("log_q", "<f2", (tokens, k + 1))])


def _key(window: np.ndarray) -> int:
    digest = hashlib.blake2b(window.astype("<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _keys(file: Path) -> list[int]:
    """The windows of a shard; none where it is missing or damaged."""
    try:
        return np.load(file, mmap_mode="r")["key"].tolist()
    except (OSError, ValueError, IndexError):
        return []


def _digest(teacher: Mamba2LM) -> str:
    """Of all weights, whatever device they are on."""
    found = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read_record(folder: Path) -> dict | None:
    try:
        return json.loads(read_text(folder / _RECORD))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DfssmError(f"{folder / _RECORD}: cannot be read ({reason(error)}); remove {folder}") from None
