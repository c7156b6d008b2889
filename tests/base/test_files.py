"""Files and folders that are there whole or not at all: what is left when a writer is refused, killed, or not alone."""

import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lower_layer import lower_layer, moments, replace

from dfssm.base import files
from dfssm.base.errors import DfssmError
from dfssm.base.files import new_folder, part_of, write_file
from dfssm.targets import bundle as bundles
from dfssm.targets.bundle import Manifest, check_files, file_entry, open_bundle
from dfssm.targets.files import Files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def make(target: Path, text: str, replace: bool = True) -> None:
    """A folder of two files that say `text`."""
    with new_folder(target, replace) as draft:
        for name in ("manifest.json", "model"):
            (draft / name).write_text(text)


def on_threads(write, given, read, stop: threading.Event) -> None:
    """`write` of each that is given, and `read`, which ends at `stop`: this is set when all have written."""
    writers = [threading.Thread(target=write, args=(one,)) for one in given]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()


@pytest.mark.parametrize("content", [b"\xff\x00", "é\n", lambda draft: draft.write_text("made")])
def test_a_file_holds_what_it_is_given(tmp_path, content):
    for _ in range(2):  # new, and replaced
        write_file(tmp_path / "a", content)
        expected = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else b"made"
        assert (tmp_path / "a").read_bytes() == expected and names(tmp_path) == ["a"]


def test_rights_are_those_of_any_new_file_or_of_the_replaced_one(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "new", b"")
    finally:
        os.umask(before)
    (tmp_path / "old").touch()
    (tmp_path / "old").chmod(0o604)
    write_file(tmp_path / "old", b"")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "old")] == [0o640, 0o604]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    write_file(tmp_path / "link", "text")
    assert os.readlink(tmp_path / "link") == "elsewhere/file"
    assert (tmp_path / "elsewhere/file").read_text() == "text"
    (tmp_path / "elsewhere/bundle").mkdir()
    (tmp_path / "b").symlink_to("elsewhere/bundle")
    make(tmp_path / "b", "new")
    assert (tmp_path / "b").is_symlink() and contents(tmp_path / "elsewhere/bundle")["model"] == "new"


@pytest.mark.parametrize("content", [b"text", lambda draft: draft.write_bytes(b"text")])
def test_a_pipe_is_written_through(tmp_path, content):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    write_file(tmp_path / "pipe", content)
    reader.join(timeout=10)
    assert read == [b"text"] and (tmp_path / "pipe").is_fifo()


def test_a_device_stays_a_device_and_a_full_one_is_named():
    write_file("/dev/null", b"x")
    with pytest.raises(DfssmError, match="^cannot write /dev/full: No space left on device; "):
        write_file("/dev/full", b"x")
    assert Path("/dev/null").is_char_device() and Path("/dev/full").is_char_device()


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    write_file(tmp_path / "a", "before")

    def fail(draft):
        draft.write_text("half")
        raise ValueError("a bug keeps its traceback")

    with pytest.raises(ValueError, match="a bug"):
        write_file(tmp_path / "a", fail)
    make(tmp_path / "b", "before")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b", replace=True) as draft:
        (draft / "model").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_text() == "before" and contents(tmp_path / "b")["model"] == "before"


def test_a_librarys_own_error_on_a_full_disk_is_that_of_the_disk(tmp_path, monkeypatch):
    """safetensors and torch raise exceptions of their own: what the disk says comes out."""

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    def library(draft):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(DfssmError, match="^cannot write .*: No space left on device; "):
        write_file(tmp_path / "a", library)
    assert names(tmp_path) == []


def test_a_folder_replaces_only_what_it_may(tmp_path):
    make(tmp_path / "b", "one", replace=False)
    with pytest.raises(DfssmError, match="b exists and is not empty: choose another output"):
        make(tmp_path / "b", "two", replace=False)
    with pytest.raises(DfssmError, match="c exists now: another program made it"), new_folder(tmp_path / "c"):
        make(tmp_path / "c", "two", replace=False)
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "three", replace=False)
    assert contents(tmp_path / "b")["model"] == "one" and contents(tmp_path / "empty")["model"] == "three"
    assert names(tmp_path) == ["b", "empty"]


def refuse(*codes):
    """An _exchange or rename that a file system answers with these errors, one a call; then with the last."""
    left = list(codes)

    def answer(*_):
        code = left.pop(0) if len(left) > 1 else left[0]
        raise OSError(code, os.strerror(code))

    return answer


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EXDEV, errno.ENOSYS])
def test_without_exchange_it_is_two_renames(tmp_path, monkeypatch, code):
    make(tmp_path / "b", "one")
    monkeypatch.setattr(files, "_exchange", refuse(code))
    make(tmp_path / "b", "two")
    assert contents(tmp_path / "b") == {"manifest.json": "two", "model": "two"} and names(tmp_path) == ["b"]


def test_a_libc_without_renameat2(tmp_path, monkeypatch):
    make(tmp_path / "b", "one")
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    make(tmp_path / "b", "two")
    assert contents(tmp_path / "b")["model"] == "two" and names(tmp_path) == ["b"]


def test_a_folder_that_cannot_be_renamed_gets_new_files(tmp_path, monkeypatch):
    """overlayfs answers EXDEV for a folder of a lower layer, to exchange and rename alike."""
    make(tmp_path / "b", "one")
    (tmp_path / "b" / "left").write_text("over")
    (tmp_path / "b" / "folder").mkdir()
    inode = (tmp_path / "b").stat().st_ino
    monkeypatch.setattr(files, "_exchange", refuse(errno.EXDEV))
    monkeypatch.setattr(files, "_rename_twice", refuse(errno.EXDEV))
    make(tmp_path / "b", "two")
    assert contents(tmp_path / "b") == {"manifest.json": "two", "model": "two"} and names(tmp_path) == ["b"]
    assert (tmp_path / "b").stat().st_ino == inode


def make_bundle(folder: Path, text: str, *more: str) -> Path:
    """A bundle whose files, the two of a graph and `more`, say `text`."""
    folder.mkdir(parents=True)
    names = ["model.onnx", "model.onnx.data", *more]
    for name in names:
        (folder / name).write_text(text)
    entries = {name: file_entry(folder / name) for name in names}
    (folder / "manifest.json").write_text(Manifest("onnx", {}, "fp32", 0, entries, {"made": text}).to_json())
    return folder


def said(folder: Path, hashes: bool = True) -> str:
    """What the files of a bundle say, all the same; DfssmError where it is refused."""
    with open_bundle(folder, hashes) as bundle:
        (text,) = {bundle.read(name).decode() for name in bundle.manifest.files}
        assert bundle.manifest.tools["made"] == text
        return text


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Two bundles; each has a file that the other has not."""
    return make_bundle(tmp_path / "b", "one", "golden"), make_bundle(tmp_path / "new", "two", "tokenizer.json")


def test_a_bundle_that_cannot_be_renamed_is_the_old_or_the_new_at_every_event(two, tmp_path):
    """A manifest that is replaced last leaves a mixture, which is refused, until then."""
    target, new = two
    found = moments(target, new, tmp_path)
    kinds = [said(place) for place in found]
    assert kinds == sorted(kinds) and kinds.count("one") >= 6 <= kinds.count("two")
    assert contents(target) == contents(new) and names(tmp_path)[-2:] == ["b", "new"]
    for place in found:
        for other in (new, make_bundle(place.parent / "third", "three")):  # the same again, or another
            again = place.parent / "again" / "b"
            shutil.copytree(place, again)
            with lower_layer():
                replace(again, other)
            assert contents(again) == contents(other)
            shutil.rmtree(again.parent)


@pytest.mark.parametrize("lasts", [False, True])
def test_a_bundle_that_cannot_be_renamed_is_the_old_or_the_new_after_an_error_at_every_event(two, tmp_path, lasts):
    """A full disk, say: what comes after the error may succeed, or not."""
    target, new = two
    old, whole = tmp_path / "old", {"one": contents(target), "two": contents(new)}
    target.rename(old)
    kinds: list[str] = []
    for count in range(100):
        shutil.copytree(old, target)
        events = itertools.count()

        def event(events=events, at=count):
            now = next(events)
            if now == at or (lasts and now > at):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        try:
            with lower_layer(event):
                replace(target, new)
            break
        except DfssmError as error:
            assert "b: No space left on device" in str(error)
        kinds.append(said(target))
        if not lasts:  # the parts are gone; of the old one what the new one lacks may not be
            assert contents(target).items() >= whole[kinds[-1]].items()
            assert set(names(target)) <= {*whole[kinds[-1]], "golden"}
        with lower_layer():
            replace(target, new)
        assert contents(target) == whole["two"] and names(tmp_path) == ["b", "new", "old"]
        shutil.rmtree(target)
    assert kinds == sorted(kinds) and kinds.count("one") >= 6 <= kinds.count("two")


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("renamed", [True, False])
def test_a_reader_that_has_read_the_old_manifest_gets_the_new_bundle_whole(two, monkeypatch, hashes, renamed):
    """The files that it opens next are those of the new one: of another size or hash, or, of the same size, mixed."""
    target, new = two
    read, done = bundles._read, []

    def slow(path, content):
        found = read(path, content)
        if not done:
            done.append(True)
            if renamed:  # the whole folder, whose old files are removed
                replace(target, new)
            else:
                with lower_layer():
                    replace(target, new)
        return found

    monkeypatch.setattr(bundles, "_read", slow)
    assert said(target, hashes) == "two" and done
    check_files(target)


def test_a_file_that_goes_to_its_place_is_found(two, tmp_path):
    target, new = two
    place = next(place for place in moments(target, new, tmp_path) if said(place) == "two" and "golden" in names(place))
    part = part_of((place / "manifest.json").read_bytes())
    assert names(place / part) == ["model.onnx", "model.onnx.data", "tokenizer.json"]

    def moved(path: Path) -> str:
        before = path.exists()
        files._end(place)
        if not path.exists():
            raise DfssmError(f"{path} is missing")
        return f"{path.name}, {before}"

    with Files(place) as opened:
        assert not opened.in_place and opened.read("model.onnx") == b"two"
        assert opened.by_path("model.onnx.data", lambda path: path.parent.name) == part
        assert opened.by_path("model.onnx.data", moved) == "model.onnx.data, True"
        assert opened.read("model.onnx.data") == b"two" and not (place / part).exists()
        assert opened.by_path("model.onnx.data", lambda path: path) == place / "model.onnx.data"
        with pytest.raises(DfssmError, match="b/none is missing"):
            opened.read("none")
    with Files(place) as opened:
        assert opened.in_place


def test_a_part_that_is_a_link_leads_nowhere(two, tmp_path):
    """Whoever made the bundle: a writer would move, or remove, what the link names."""
    target, new = two
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "model.onnx").write_text("mine")
    for manifest in (b"", (target / "manifest.json").read_bytes()):
        (target / part_of(manifest)).symlink_to(tmp_path / "private")
    assert said(target) == "one"
    with lower_layer():
        replace(target, new)
    assert contents(target) == contents(new) and contents(tmp_path / "private") == {"model.onnx": "mine"}


def test_a_repository_that_cannot_be_renamed_is_replaced_and_the_bundle_in_it_is_whole_at_every_event(two, tmp_path):
    repositories = [tmp_path / "old" / "repository", tmp_path / "next"]
    for repository, bundle in zip(repositories, two, strict=True):
        repository.mkdir(parents=True)
        bundle.rename(repository / "1")
        (repository / "config.pbtxt").write_text(bundle.name)
    target, new = repositories
    kinds = [said(place / "1") for place in moments(target, new, tmp_path)]
    assert kinds == sorted(kinds) and set(kinds) == {"one", "two"}
    assert (target / "config.pbtxt").read_text() == "new" and contents(target / "1") == contents(new / "1")


@pytest.mark.parametrize("where", ["place", "part"])
def test_a_folder_with_the_name_of_a_file_keeps_no_bundle_from_being_replaced(two, tmp_path, where):
    target, new = two
    if where == "place":
        (target / "tokenizer.json").unlink(missing_ok=True)
        (target / "tokenizer.json").mkdir()
    else:
        (target / part_of((target / "manifest.json").read_bytes()) / "model.onnx").mkdir(parents=True)
    with lower_layer():
        replace(target, new)
    assert contents(target) == contents(new)


def test_a_lock_that_is_not_given_back_is_named(two, monkeypatch):
    target, new = two
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    handle = os.open(target, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        with pytest.raises(DfssmError, match="b cannot be replaced: another process has had it locked"), lower_layer():
            replace(target, new)
        assert said(target) == "one"
    finally:
        os.close(handle)


def test_threads_on_one_bundle_that_cannot_be_renamed_tear_nothing(two, tmp_path):
    target, new = two
    sources, errors, stop = [new, make_bundle(tmp_path / "third", "one", "taps.onnx")], [], threading.Event()

    def write(source):
        try:
            for _ in range(30):
                replace(target, source)
        except Exception as error:
            errors.append(error)

    def read():
        while not stop.is_set():
            try:
                said(target, hashes=False)
            except Exception as error:
                errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_exchange", refuse(errno.EXDEV))
        patch.setattr(files, "_rename_twice", refuse(errno.EXDEV))
        on_threads(write, sources, read, stop)
    assert errors == [] and contents(target) in [contents(source) for source in sources]


def test_another_refusal_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    make(tmp_path / "b", "one")
    monkeypatch.setattr(files, "_exchange", refuse(errno.EROFS))
    with pytest.raises(DfssmError, match="Read-only file system"):
        make(tmp_path / "b", "two")
    assert contents(tmp_path / "b")["model"] == "one" and names(tmp_path) == ["b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dfssm.base import files

count, exchange = int(sys.argv[2]), sys.argv[3] == "exchange"
events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlopen"}

def killer(event, _):
    global count
    if event in events:
        count -= 1
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)

def no_exchange(*_):
    raise OSError(22, "no exchange")

if not exchange:
    files._exchange = no_exchange
sys.addaudithook(killer)
target = Path(sys.argv[1])
with files.new_folder(target, replace=True) as draft:
    for name in ("manifest.json", "model"):
        (draft / name).write_text("two")
count = 1 << 30
print("done")
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_any_event_nothing_is_lost_and_the_next_writer_cleans_up(tmp_path, way):
    """At every event that Python's audit hooks report, from the first on until the writer gets through."""
    whole = [{"manifest.json": text, "model": text} for text in ("one", "two")]
    for count in range(1, 200):
        place = tmp_path / f"{count}"
        place.mkdir()
        make(place / "b", "one")
        done = subprocess.run([sys.executable, "-c", KILLED, place / "b", str(count), way], capture_output=True)
        if way == "exchange":
            assert contents(place / "b") in whole, f"killed at event {count}"
        if done.returncode == 0:
            assert contents(place / "b") == whole[1] and names(place) == ["b"]
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        # Whatever is left, the next writer, which is refused half-way, has the old or the new one in place.
        with pytest.raises(ZeroDivisionError), new_folder(place / "b", replace=True):
            raise ZeroDivisionError
        assert contents(place / "b") in whole and names(place) == ["b"], f"killed at event {count}"
    assert done.returncode == 0 and count > 10


def test_threads_on_one_file_tear_nothing(tmp_path):
    errors, stop = [], threading.Event()

    def write(letter):
        try:
            for _ in range(100):
                write_file(tmp_path / "a", letter * 10_000)
        except Exception as error:
            errors.append(error)

    def read():
        while not stop.is_set():
            if (tmp_path / "a").exists():
                text = (tmp_path / "a").read_text()
                if len(text) != 10_000 or len(set(text)) != 1:
                    errors.append(text[:10])

    on_threads(write, "abcd", read, stop)
    assert errors == [] and names(tmp_path) == ["a"]


def apart() -> list[str]:
    """The beginning of a command that runs as process 1 of a PID namespace, as in a container."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    pytest.skip("this system makes no PID namespaces for its users")


@pytest.mark.parametrize("begin", [list, apart], ids=["of one system", "of several containers"])
def test_processes_on_one_folder_tear_nothing(tmp_path, begin):
    code = """
import sys
from pathlib import Path
from dfssm.base.files import new_folder
for _ in range(40):
    with new_folder(Path(sys.argv[1]), replace=True) as draft:
        for name in ("manifest.json", "model"):
            (draft / name).write_text(sys.argv[2])
"""
    command = [*begin(), sys.executable, "-c", code, tmp_path / "b"]
    writers = [subprocess.Popen([*command, text]) for text in ("one", "two", "three")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    found = contents(tmp_path / "b")
    assert found.keys() == {"manifest.json", "model"} and len(set(found.values())) == 1
    assert names(tmp_path) == ["b"]


def test_the_draft_of_a_living_writer_stays(tmp_path):
    with new_folder(tmp_path / "b") as draft:
        write_file(tmp_path / "b.txt", "another target")
        with new_folder(tmp_path / "b", replace=True) as second:
            assert draft.is_dir() and second != draft
    assert names(tmp_path) == ["b", "b.txt"]


def test_drafts_of_other_targets_are_collected_too_and_foreign_files_stay(tmp_path):
    """A writer killed after its rename leaves an empty draft of a file that nobody may write again."""
    left = tmp_path / f".tokenizer.json.{'0' * 16}.dfssm-new"
    left.mkdir()
    (left / "draft").write_text("half")
    foreign = [tmp_path / f".a.{'0' * 16}.tmp", tmp_path / f".a.{'0' * 16}.dfssm-new.txt"]
    for path in foreign:
        path.write_text("not ours")
    make(tmp_path / "lost", "old")
    (tmp_path / "lost").rename(tmp_path / f".lost.{'1' * 16}.dfssm-old")
    write_file(tmp_path / "b", b"")
    assert names(tmp_path) == sorted(["b", "lost", *(path.name for path in foreign)])


@pytest.mark.parametrize("name", ["é" * 120, "a" * 255])
def test_a_name_as_long_as_it_may_be(tmp_path, name):
    for text in ("one", "two"):
        write_file(tmp_path / name, text)
        make(tmp_path / f"{name[:-1]}b", text)
    assert (tmp_path / name).read_text() == "two" and len(names(tmp_path)) == 2


def test_one_process_is_alone_in_a_folder(tmp_path, monkeypatch):
    with files.alone(tmp_path / "a" / "b"):
        with (
            pytest.raises(DfssmError, match="b: another process writes into it now"),
            files.alone(tmp_path / "a" / "b"),
        ):
            pass
        with files.alone(tmp_path / "a"):
            make(tmp_path / "a" / "c", "others")
    with pytest.raises(ZeroDivisionError), files.alone(tmp_path / "d" / "e"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b", "c"]
    (tmp_path / "file").touch()
    with pytest.raises(DfssmError, match="cannot write .*file: File exists"), files.alone(tmp_path / "file"):
        pass
    monkeypatch.setattr(files.fcntl, "flock", refuse(errno.ENOLCK))
    with files.alone(tmp_path / "a"), files.alone(tmp_path / "a"):
        pass


def test_temporary_files_that_have_no_place_or_no_room_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(DfssmError, match="^of the caller$"), files.temporary_folder("this") as folder:
        assert folder.parent == tmp_path
        raise DfssmError("of the caller")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch, pytest.raises(DfssmError) as caught, files.temporary_folder("this") as folder:
        patch.setattr(os, "fsync", refuse(errno.ENOSPC))
        raise full
    assert str(caught.value).startswith(
        f"this takes room in {folder} (No space left on device): set TMPDIR to a folder"
    )
    with pytest.raises(OSError, match="Input/output"), files.temporary_folder("this"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert names(tmp_path) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(DfssmError, match=r"^this takes a folder for temporary files \(No such file.*\): set TMPDIR to"):
        files.temporary_folder("this").__enter__()


def test_folders_made_for_a_file_that_is_refused_go_again(tmp_path):
    def refuse(draft):
        raise DfssmError("no")

    with pytest.raises(DfssmError, match="no"):
        write_file(tmp_path / "a" / "b" / "file", refuse, parents=True)
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(DfssmError, match="no"):
        write_file(tmp_path / "a" / "b" / "file", refuse, parents=True)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == []
