"""Reading a file that somebody else may have put there: no read waits for ever. Standard library only."""

import errno
import os
import stat
from io import BufferedReader, TextIOWrapper
from pathlib import Path


def open_file(path: str | Path, folder: int | None = None) -> BufferedReader:
    """A regular file, to be read; `folder`: the open one that `path` is relative to. OSError for anything else.

    One that says it has no bytes is empty: those of /proc say so, and a read of some waits (kmsg).
    """
    # Of a pipe nobody may be at the other end.
    flags = os.O_RDONLY | os.O_NONBLOCK
    file = open(path, "rb", opener=lambda name, _: os.open(name, flags, dir_fd=folder))
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size:
        return file
    file.close()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    return open(os.devnull, "rb")


def read_file(path: str | Path) -> bytes:
    """What a regular file holds; OSError as of `open_file`."""
    with open_file(path) as file:
        return file.read()


def open_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict") -> TextIOWrapper:
    """A regular file of text, to be read; OSError as of `open_file`."""
    return TextIOWrapper(open_file(path), encoding, errors)


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text that a regular file holds; OSError as of `open_file`, ValueError where it is none."""
    with open_text(path, encoding) as file:
        return file.read()
