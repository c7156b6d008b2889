"""Writing files and folders: there whole or not at all. The one place that does it; standard library only.

A draft is made in a folder with a random name beside the target, synced to the disk, and renamed into place; then the
folder around it is synced, so that the name survives a power cut too. Two writers of one target, threads or processes,
in one container or two, never share a draft: the last one to finish wins. A draft is locked (flock) while its writer
lives. One that nobody holds is what a killed writer left; the next writer into the same place removes it, and whatever
else lies in its folder: some libraries write through files of their own.

A folder is replaced by exchange (renameat2), so that there is a complete one at every moment. Where the file system has
no exchange, it is two renames: a writer killed between them leaves the old folder beside the target, under a name that
ends in .dfssm-old, and the next writer puts it back.

Where a folder cannot be renamed at all (on an overlay file system one that came with the image), its files still can,
and manifest.json is the switch. The others are first put into a folder in it, whose name has the sha256 of the new
manifest (`part_of`); then the manifest is replaced, by one rename; then the files go to their places. A reader looks
for a file in the part of the manifest that it has read, and then in its place (targets/files.py, native/src/files.cpp):
so it finds the old files or the new ones at every moment. Writers of such a folder wait for each other. What a killed
one has begun is ended by the next: a file of the manifest that is there goes to its place, one of another is removed.
A folder without manifest.json, which is no bundle, has no switch: its files are replaced one by one, and those of the
folders in it as theirs.

What is no regular file, a device or a pipe, is written through, and a link is followed: what it names is replaced.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import DfssmError, reason
from .paths import MANIFEST

_PATIENCE = 30  # seconds: a writer takes milliseconds
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_AT_FDCWD = -100

# Names of drafts, of folders on their way out, and of parts: nobody else's files look like these.
_NEW, _OLD, _PART = ".dfssm-new", ".dfssm-old", ".dfssm-part"
_LONGEST = 200  # bytes of the target's name in it: a name may have 255
_DRAFT = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}({_NEW}|{_OLD})")
_PARTS = re.compile(rf"\.[0-9a-f]{{16}}{_PART}")

# Answers of a file system that has no exchange, or none for this folder. EXDEV: overlayfs, a folder of a lower layer.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP, errno.EPERM)


def write_file(path: str | Path, content: bytes | str | Callable[[Path], object], parents: bool = False) -> None:
    """Write a file: bytes, text as UTF-8, or what `content(draft)` makes of the file `draft`.

    `parents`: make its folder if that is missing. Raises DfssmError when the operating system refuses; the target and
    its folder are then as they were.
    """
    target = Path(path)
    with writing(target):
        mode = _mode(target)  # before the link is resolved: /dev/stdout leads to a pipe that has no path
        if mode is not None and not stat.S_ISREG(mode):
            return _write_through(target, content)
        target = target.resolve()
        with _made(target.parent) if parents else contextlib.nullcontext(), _draft(target) as folder:
            draft = folder / "draft"
            _fill(draft, content)
            draft.chmod(stat.S_IMODE(mode) if mode is not None else 0o666 & ~_umask())
            sync(draft)
            draft.replace(target)
            sync(target.parent)


def append(path: Path, text: str) -> None:
    """Add to the end of a regular file, or make it. OSError for anything else: nobody may read a pipe."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    with open(handle, "a", encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        file.write(text)


@contextmanager
def new_folder(path: str | Path, replace: bool = False, parents: bool = False) -> Iterator[Path]:
    """A new folder in a `with` block, which becomes `path` when the block ends well.

    With `replace` it takes the place of a folder that is there; otherwise only an empty one may be there. `parents`:
    make its folder if that is missing. Raises DfssmError when it may not, or when the operating system refuses; `path`
    is then as it was, or, where only its files can be replaced, what it was or is to be.
    """
    target = Path(path)
    with ExitStack() as stack:
        with writing(target):
            target = target.resolve()
            if not replace and target.is_dir() and any(target.iterdir()):
                raise DfssmError(f"{target} exists and is not empty: choose another output")
            if parents:
                stack.enter_context(_made(target.parent))
            draft = stack.enter_context(_draft(target))
        yield draft
        with writing(target):
            for inner in (*sorted(draft.rglob("*"), reverse=True), draft):
                sync(inner)
            _put(draft, target, replace)
            sync(target.parent)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """In the `with` block the folder is there; what is made of it goes again where the block fails."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # others write into it
            for one in new:
                one.rmdir()
        raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """In the `with` block no other process is `alone` in `folder`, which is made if it is missing. DfssmError where one
    is, or the operating system refuses. On a file system without locks nobody is kept out.
    """
    with ExitStack() as stack:
        with writing(folder):
            stack.enter_context(_made(folder))
            handle = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DfssmError(f"{folder}: another process writes into it now; wait for it, or choose another") from None
        except OSError:
            pass
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write (permissions, a full disk) into a DfssmError about `path`, or about
    the target where that is in a draft.
    """
    try:
        if "\0" in os.fsdecode(os.fsencode(path)):
            raise ValueError("a zero byte")
    except ValueError as error:  # half a surrogate pair is no name either
        raise DfssmError(f"cannot write {str(path)!a}: no file can have this name ({error}); give another") from None
    try:
        yield
    except OSError as error:
        shown = Path(*(found[1] if (found := _DRAFT.fullmatch(part)) else part for part in Path(path).parts))
        # NumPy, where a disk is full, gives numbers of bytes.
        why = reason(error) if error.errno else f"{error}: a full disk, or a limit on files"
        raise DfssmError(f"cannot write {shown}: {why}; choose another place") from error


def _fill(draft: Path, content: bytes | str | Callable[[Path], object]) -> None:
    if isinstance(content, bytes | str):
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    try:
        content(draft)
    except (OSError, DfssmError):
        raise
    except Exception as error:
        # Libraries in Rust name the error's number, and take their file away, which makes room again.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        probe(draft)
        raise


def probe(path: Path) -> None:
    """After a library failed to write a file: OSError if the disk is full. They report that in exceptions of their own.

    Appends 64 kB to `path`, a draft: a full disk refuses these, too.
    """
    with path.open("ab") as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """In the `with` block, a new folder among the temporary files. DfssmError where there can be none, or no room in it
    for what the block writes; `what` takes it.
    """
    import tempfile

    remedy = "set TMPDIR to a folder with room that you can write to"
    try:
        folder = tempfile.TemporaryDirectory(prefix="dfssm-")
    except OSError as error:
        raise DfssmError(f"{what} takes a folder for temporary files ({reason(error)}): {remedy}") from None
    with folder as name:
        try:
            yield Path(name)
        except (OSError, DfssmError) as error:
            try:
                probe(Path(name) / "probe")
            except OSError as full:
                raise DfssmError(f"{what} takes room in {name} ({reason(full)}): {remedy}") from error
            raise


def _write_through(target: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """To a device or a pipe. A writer that wants a file gets one in the folder for temporary files."""
    with temporary_folder(f"writing {target}") as folder:
        draft = folder / "draft"
        _fill(draft, content)
        with draft.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A folder for a draft beside `target`. What is there at the end is what came of a block that failed, or what the
    target was before.
    """
    collect(target.parent)
    folder, lock = _make_draft(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _short(name: str) -> str:
    return os.fsencode(name)[:_LONGEST].decode(errors="ignore")


def _make_draft(target: Path) -> tuple[Path, int]:
    """A new folder for a draft beside `target`, and the descriptor that holds its lock."""
    while True:
        draft = target.with_name(f".{_short(target.name)}.{secrets.token_hex(8)}{_NEW}")
        draft.mkdir()
        # Who collects drafts at this moment may take it for a left one, as long as it is not locked: then another.
        try:
            lock = os.open(draft, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = draft.exists()
        except BlockingIOError:
            mine = False
        except OSError:  # a file system without locks: there nobody collects drafts
            mine = True
        if mine:
            return draft, lock
        os.close(lock)


def collect(folder: Path) -> None:
    """Remove the drafts that killed writers have left in `folder`, and put back what they had taken away."""
    with contextlib.suppress(OSError):
        for left in sorted(folder.iterdir()):
            if (found := _DRAFT.fullmatch(left.name)) and (lock := _abandoned(left)) is not None:
                target = folder / found[1]
                if found[2] == _NEW or os.path.lexists(target):
                    shutil.rmtree(left, ignore_errors=True)
                elif len(os.fsencode(found[1])) < _LONGEST - 3:  # a whole name
                    left.rename(target)
                os.close(lock)


def _abandoned(path: Path) -> int | None:
    """A lock on `path` if no living writer has it, else None."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _put(draft: Path, target: Path, replace: bool) -> None:
    """`draft` takes the place of the folder `target`, which then is where `draft` was."""
    try:
        draft.rename(target)  # it replaces an empty folder, too
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not replace:
            raise DfssmError(f"{target} exists now: another program made it; choose another output") from None
    try:
        _exchange(draft, target)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        try:
            _rename_twice(draft, target)
        except OSError as refused:
            if refused.errno not in _NO_EXCHANGE:
                raise
            _replace_files(draft, target)


def _exchange(one: Path, other: Path) -> None:
    """Both names change places in one step. Raises OSError; ENOSYS where libc has no renameat2."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _rename_twice(draft: Path, target: Path) -> None:
    old = draft.with_name(draft.name.removesuffix(_NEW) + _OLD)
    lock = os.open(target, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(draft)
    finally:
        os.close(lock)


def part_of(manifest: bytes) -> str:
    """The name, in a folder whose manifest.json holds these bytes, of the folder with files not yet in their places."""
    return f".{hashlib.sha256(manifest).hexdigest()[:16]}{_PART}"


def is_part(name: str) -> bool:
    """Whether `part_of` gives such names."""
    return _PARTS.fullmatch(name) is not None


def _replace_files(draft: Path, target: Path) -> None:
    """The files of `draft` become those of `target`, a folder that cannot be renamed."""
    names = {path.name for path in draft.iterdir()}
    lock = os.open(target, os.O_RDONLY)
    try:
        _wait_for(lock, target)  # another writer's files would take the places of ours while ours take theirs
        _end(target)
        if MANIFEST in names:
            _switch(draft, target, names - {MANIFEST})
        else:
            for name in sorted(names):
                if (draft / name).is_dir() and (target / name).is_dir():  # of a repository, a bundle: it has a switch
                    _replace_files(draft / name, target / name)
                else:
                    (draft / name).replace(target / name)
        for path in target.iterdir():
            if path.name not in names:
                _remove(path)
        sync(target)
    finally:
        os.close(lock)


def _wait_for(lock: int, target: Path) -> None:
    """The lock on the folder `target`, which any reader may have. DfssmError where one does not give it back."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                why = f"another process has had it locked for {_PATIENCE} s"
                raise DfssmError(f"{target} cannot be replaced: {why}; wait for it, or choose another output") from None
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return


def _switch(draft: Path, target: Path, names: set[str]) -> None:
    """`target` gets the manifest of `draft`, and with it the files of these names."""
    part = target / part_of((draft / MANIFEST).read_bytes())
    try:
        part.mkdir()
        for name in sorted(names):
            (draft / name).rename(part / name)
        # Not all file systems keep the order of renames over a power cut: before the switch all it leads to is on the
        # disk, and the switch itself before the places of the old files are taken.
        sync(part)
        sync(target)
        (draft / MANIFEST).replace(target / MANIFEST)
        sync(target)
        _end(target)
    except BaseException:  # before the switch or after it: `_end` looks which manifest is there
        with contextlib.suppress(OSError):
            _end(target)
        raise


def _end(target: Path) -> None:
    """What a writer has begun in `target` is ended: nothing is in a part any more."""
    try:
        current = part_of((target / MANIFEST).read_bytes())
    except FileNotFoundError:
        current = ""
    for part in target.iterdir():
        if part.name == current and not part.is_symlink():  # no writer's: what it leads to would be moved
            for path in sorted(part.iterdir()):
                place = target / path.name
                if _is_folder(place):  # no file takes its place
                    _remove(place)
                if _is_folder(path):  # no writer's
                    _remove(path)
                else:
                    path.replace(place)
            sync(target)  # the places before the part is removed
            part.rmdir()
        elif is_part(part.name):
            _remove(part)


def _is_folder(path: Path) -> bool:
    """Whether it is one itself, no link to one."""
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if _is_folder(path) else path.unlink()


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _umask() -> int:
    """The umask, without changing it: another thread may be making a file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync a folder
            raise
    finally:
        os.close(handle)
