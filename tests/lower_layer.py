"""The files of a folder that can neither be exchanged nor renamed are replaced, as in the lower layer of an overlay."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dfssm.base import files
from dfssm.base.files import new_folder

EVENTS = (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (files, "sync")


def refuse(*_):
    """What overlayfs answers."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@contextmanager
def lower_layer(event: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In the `with` block folders are so; before each change that a writer makes to their files there is an `event`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_exchange", refuse)
        patch.setattr(files, "_rename_twice", refuse)
        replacing, inside = files._replace_files, False  # `inside`: what an event itself changes is none

        def watched(draft: Path, target: Path) -> None:
            with pytest.MonkeyPatch.context() as inner:
                for module, name in EVENTS:
                    inner.setattr(module, name, before(getattr(module, name)))
                replacing(draft, target)

        def before(function: Callable) -> Callable:
            def call(*arguments, **keywords):
                nonlocal inside
                if not inside:
                    inside = True
                    try:
                        event()
                    finally:
                        inside = False
                return function(*arguments, **keywords)

            return call

        patch.setattr(files, "_replace_files", watched)
        yield


def replace(target: Path, new: Path) -> None:
    """What is in `new` takes the place of what is in `target`."""
    with new_folder(target, replace=True) as draft:
        shutil.copytree(new, draft, dirs_exist_ok=True)


def moments(target: Path, new: Path, into: Path) -> list[Path]:
    """Copies of `target`, made in `into`, as a writer of what is in `new` leaves it that is killed before each change
    that it makes; the last is of when it is done.
    """
    copies: list[Path] = []

    def copy() -> None:
        place = into / f"{len(copies)}" / target.name
        shutil.copytree(target, place)
        copies.append(place)

    with lower_layer(copy):
        replace(target, new)
    copy()
    return copies
