"""An output folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfssm.opset import DfssmError
from dfssm.opset.paths import MANIFEST


def check_output(folder: Path, force: bool) -> None:
    """Refuse an output that could not be put in place, before any slow work.

    Raises DfssmError when `folder` is occupied: without `force` by anything, with it by anything that is not itself a
    bundle, for replacing deletes.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise DfssmError(f"{folder} exists: choose another output with -o, or replace it with --force")
    if not (folder / MANIFEST).is_file():
        raise DfssmError(f"{folder} exists and is not a bundle, so --force does not replace it: choose another -o")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, renamed to it when the block ends, removed when the block fails.

    What stood at `folder` goes only once the new one is in place. Everything is synced to disk before the rename.
    Raises DfssmError when something cannot be written.
    """
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with writing(folder):
            stage.mkdir()
        yield stage
        with writing(folder):
            _sync(stage)
            _replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write (permissions, a full disk) into a DfssmError about `path`."""
    try:
        yield
    except OSError as error:
        raise DfssmError(
            f"cannot write {path}: {error.strerror or error}; check its folder or choose another"
        ) from error


def _replace(stage: Path, folder: Path) -> None:
    old = stage.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        stage.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _fsync(folder.parent)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
