"""The files of a folder, opened once: what was checked is what is used. Standard library only."""

import errno
import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path
from typing import Self, TypeVar

from dfssm.base.errors import DfssmError, reason
from dfssm.base.files import part_of
from dfssm.base.paths import MANIFEST
from dfssm.base.reading import open_file

Result = TypeVar("Result")


class Files:
    """Files of `folder` by name, open until the end of a `with` block, or of this object; what was mapped stays.

    The folder and each file of it are opened once. So another folder put in its place, or a file in place of one, does
    not mix with what was read before. A file may be a link.

    Where a writer replaces the files of a folder that cannot be renamed, those of the manifest that is there may still
    be in its part (`dfssm.base.files`): they are found there. It takes them from there to their places, never back, so
    a file is looked for in the part first: what is not there is in its place by then.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._close = ExitStack()
        weakref.finalize(self, self._close.close)
        self._opened: dict[str, BufferedReader] = {}
        self._part: tuple[Path, int] | None = None
        try:
            self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise DfssmError(f"{self.folder} cannot be read ({error.strerror}): give a bundle") from None
        self._close.callback(os.close, self._handle)
        try:
            name = part_of(self.read(MANIFEST))
        except DfssmError:  # no bundle, or not yet
            return
        try:
            part = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._handle)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # nearly always: each file is in its place
                return
            why = f"{self.folder / name} cannot be read ({reason(error)})"
            raise DfssmError(f"{why}: copy or compile it again") from None
        self._close.callback(os.close, part)
        self._part = self.folder / name, part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was mapped stays."""
        self._close.close()

    def open(self, name: str) -> BufferedReader:
        """The file, at its beginning. Raises DfssmError when it is missing, no regular file, or closed to us."""
        if name not in self._opened:
            try:
                file = self._open(name)
            except (FileNotFoundError, IsADirectoryError):
                raise self._missing(name) from None
            except (OSError, ValueError) as error:
                why = f"{self.folder / name} cannot be read ({reason(error)})"
                raise DfssmError(f"{why}: copy or compile it again") from None
            self._opened[name] = self._close.enter_context(file)
        self._opened[name].seek(0)
        return self._opened[name]

    def _open(self, name: str) -> BufferedReader:
        if self._part:
            with suppress(FileNotFoundError):
                return open_file(name, self._part[1])
        return open_file(name, self._handle)

    @property
    def in_place(self) -> bool:
        """Whether all files were in their places when the folder was opened."""
        return self._part is None

    def by_path(self, name: str, use: Callable[[Path], Result]) -> Result:
        """What `use` makes of the file's path, for what opens files itself; again, if the file was moved meanwhile."""
        path = self._part[0] / name if self._part else None
        if path and path.exists():
            try:
                return use(path)
            except DfssmError:
                if path.exists():
                    raise
        return use(self.folder / name)

    def replaced(self) -> bool:
        """Whether the folder has another manifest by now, or the same one written anew."""
        try:
            found = os.stat(self.folder / MANIFEST)
        except OSError:
            return False
        return not os.path.samestat(found, os.fstat(self.open(MANIFEST).fileno()))

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return os.fstat(self.open(name).fileno()).st_size

    def use(self, name: str, read: Callable[[BufferedReader], Result]) -> Result:
        """What `read` makes of the file. DfssmError as of `open`, or when the disk does not give it."""
        try:
            return read(self.open(name))
        except OSError as error:
            raise DfssmError(f"{self.folder / name} cannot be read ({error.strerror}): copy it again") from None

    def read(self, name: str) -> bytes:
        """What the file holds. DfssmError as of `use`."""
        return self.use(name, lambda file: file.read())

    def _missing(self, name: str) -> DfssmError:
        return DfssmError(f"{self.folder / name} is missing: the bundle is not complete, copy or compile it again")


def opened(folder: str | Path | Files) -> Files:
    """The files of a folder, which may be open already."""
    return folder if isinstance(folder, Files) else Files(folder)
