"""sha256 of files, on threads: OpenSSL hashes without the interpreter's lock. Standard library only."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from typing import TypeVar

from .threads import default_threads

CHUNK = 1 << 20
"""Bytes of a file that are hashed by themselves; part of the format of bundles."""

_PIECE = CHUNK  # of a read: a thread that hashes asks for the interpreter once a piece, and may wait 5 ms for it
_FEW = 4  # threads would take as long to start: 2 MB are hashed in 1 ms
_MOST_THREADS = 8  # which hash as fast as memory gives

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of each item, on as many threads as this process has cores, and no more than 8; of a few on this one."""
    items = list(items)
    if len(items) < _FEW:
        return list(map(work, items))
    with ThreadPoolExecutor(min(default_threads(), _MOST_THREADS)) as pool:
        return list(pool.map(work, items))


def pieces(handle: int, at: int, end: int) -> Iterator[bytes]:
    """The bytes of an open file from `at` up to `end`, or its own end, in pieces to be used one by one."""
    while at < end and (piece := os.pread(handle, min(_PIECE, end - at), at)):
        yield piece
        at += len(piece)


def chunks_sha256(file: BufferedReader) -> str:
    """Hex sha256 of the sha256s (32 bytes each) of the chunks of a regular file, of which the last may be shorter."""
    handle = file.fileno()
    size = os.fstat(handle).st_size

    def of_chunk(start: int) -> bytes:
        found = hashlib.sha256()
        for piece in pieces(handle, start, min(start + CHUNK, size)):
            found.update(piece)
        return found.digest()

    return hashlib.sha256(b"".join(on_threads(of_chunk, range(0, size, CHUNK)))).hexdigest()


def sha256(file: BufferedReader) -> str:
    """Hex sha256 of a regular file: that of the command sha256sum. Its position is neither used nor moved."""
    handle = file.fileno()
    found = hashlib.sha256()
    for piece in pieces(handle, 0, os.fstat(handle).st_size):
        found.update(piece)
    return found.hexdigest()
