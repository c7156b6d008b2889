"""Paths that a user gives: what lies there, and what mends it where that is not what is wanted.

Every command asks here before it imports anything slow; what reads the files asks again, for those who come by the
Python API. Nothing blocks: only regular files are opened, for two bytes. Standard library only.
"""

import os
import re
import shlex
import stat
from pathlib import Path

from .errors import DfssmError, reason
from .reading import open_file

MANIFEST, CONFIG = "manifest.json", "config.json"
"""The file that makes a folder a bundle, and the one that makes it a checkpoint."""

GOLDEN = "golden.safetensors"
"""Of a bundle; its suffix is else that of a student."""

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    "consolidated.safetensors",  # Mistral's own
)
"""Of a checkpoint; one in both formats is read from safetensors, as transformers does."""

STUDENT = "model.pt"
"""The name that students mostly have."""

OF_REPOSITORY = "dfssm/1"
"""Where the bundle lies in a model repository for Triton."""

_KINDS = {
    "teacher": ("a Mamba-2 checkpoint", "a file of a checkpoint", f"a checkpoint folder ({CONFIG}, {WEIGHTS[0]})"),
    "student": ("a student", "a folder with a student", "a model.pt or .safetensors"),
    "bundle": ("a bundle", "a file of a bundle", "a bundle (a folder that dfcompile made)"),
}
"""A model's way. Of each kind: what it is, what a path is that is not it but leads to it, and what to give."""

_STEPS = {
    "student": ("convert or distill it", "dfssm convert {} -o model.pt", STUDENT),
    "bundle": ("compile it", "dfcompile {} --target ort-cpu", "model-ort-cpu"),
}
"""What makes this kind of the one before: in words, the command, and what that leaves."""

_SUFFIXES = (".pt", ".safetensors")
_HUB = re.compile(r"([\w.-]+)/([\w.-]+)/?")
_FILES = (*_SUFFIXES, ".bin", ".json", ".onnx", ".txt")  # a name with such an end is of a file, not of a model
_ODD = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def bundle(path: str | Path) -> Path:
    """The path, if a bundle lies there; DfssmError otherwise, as `find`."""
    return find(path, "bundle")[1]


def student(path: str | Path) -> Path:
    """The path, if a student's file lies there, as far as its name and first bytes tell; DfssmError otherwise."""
    return find(path, "student")[1]


def teacher(path: str | Path) -> Path:
    """The folder of a checkpoint, that or a file of it being named; DfssmError where there is none."""
    return find(path, "teacher")[1]


def find(path: str | Path, *wanted: str) -> tuple[str, Path]:
    """Which of the kinds `wanted` ("teacher", "student", "bundle") a path is of, and the path itself.

    Of a teacher that is the folder, also where a file of it is named. Raises DfssmError that says what lies there, and
    how to get from that to what is wanted.
    """
    give = _listed([_KINDS[kind][2] for kind in wanted])
    _refuse_name_of_hub(path, wanted)
    path, mode = _look(path, give)
    kind, place = _kind(path, mode)
    names = _listed([_KINDS[name][0] for name in wanted])
    if not kind:
        lacks = " and no ".join({"teacher": CONFIG, "bundle": MANIFEST}[name] for name in wanted if name != "student")
        why = f"it has no {lacks}; " if stat.S_ISDIR(mode) and lacks else ""
        if why and "teacher" in wanted and (path / "params.json").is_file():
            why = f"it has Mistral's params.json but no {CONFIG}; put transformers' own there, or "
        raise DfssmError(f"{path} is not {names}: {why}give {give}")
    noun = "a Triton repository" if place == path / OF_REPOSITORY else _KINDS[kind][place != path]
    if kind not in wanted:
        words, commands, _ = _way(kind, str(place), wanted)
        remedy = f"{words} first: {commands}" if commands else f"give what it was made from, {give}"
        raise DfssmError(f"{path} is {noun}, not {names}: {remedy}")
    if place != path and kind != "teacher":
        raise DfssmError(f"{path} is {noun}: give {'the folder ' if kind == 'bundle' else ''}{place}")
    return kind, place


def file(path: str | Path, give: str, name: str = "") -> Path:
    """The path, if it is a file that can be read; DfssmError otherwise.

    `give`: what the user should give; `name`: what such files are called: given a folder with one, that is the remedy.
    """
    path, mode = _look(path, give)
    if stat.S_ISDIR(mode):
        inside = path / name
        raise DfssmError(f"{path} is a folder: give {inside if name and inside.is_file() else give}")
    return path


def folder(path: str | Path, give: str) -> Path:
    """The path, if it is a folder that can be read; DfssmError otherwise."""
    path, mode = _look(path, give)
    if not stat.S_ISDIR(mode):
        raise DfssmError(f"{path} is a file: give {give}")
    return path


def file_or_folder(path: str | Path, give: str) -> Path:
    """The path, if it is a file or a folder that can be read; DfssmError otherwise."""
    return _look(path, give)[0]


def output_file(path: str | Path, *sources: Path | None) -> Path:
    """The path, if a file can be written there or replaced, or if it is a pipe or a character device, which are written
    through; DfssmError otherwise, and for one of `sources`, which the command reads, or a file that is there in it or
    that a link in it names: it would destroy what it was given.
    """
    output = _output(path, "a file", stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR)
    place = output.resolve()
    for source in filter(None, sources if output.is_file() else ()):
        if place == source.resolve():
            raise DfssmError(f"cannot write {path}: it is what is read; give another place")
        if source.is_dir() and (place.parent == source.resolve() or place in map(Path.resolve, source.iterdir())):
            raise DfssmError(f"cannot write {path}: it is a file of {source}, which is read; give another place")
    return output


def output_folder(path: str | Path, source: Path | None = None) -> Path:
    """The path, if a folder can be made there or written in; DfssmError otherwise, and for `source` itself."""
    output = _output(path, "a folder", stat.S_IFDIR)
    if source and output.resolve() == source.resolve():
        raise DfssmError(f"cannot write into {path}: it is what is read; give another folder")
    return output


def _look(path: str | Path, give: str) -> tuple[Path, int]:
    """The path and its mode, those of a file or folder that may be read."""
    mode = _mode(path, f"give {give}")
    path = Path(path)
    if mode is None:
        link = f", but as a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise DfssmError(f"{path} does not exist{link}: give {give}")
    if odd := _ODD.get(stat.S_IFMT(mode)):
        raise DfssmError(f"{path} is {odd}: give {give}")
    rights = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
    if not os.access(path, rights, effective_ids=True):
        raise DfssmError(f"{path} cannot be read (Permission denied): have its owner run chmod a+rX {quoted(path)}")
    return path, mode


def _mode(path: str | Path, remedy: str) -> int | None:
    """The mode of what lies at a path, None where there is nothing."""
    if not os.fspath(path):
        raise DfssmError(f"an empty path names nothing: {remedy}")
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a folder that is closed to us, too long a name, a loop of links, a NUL
        raise DfssmError(f"{path} cannot be read ({reason(error)}): {remedy}") from None


def _kind(path: Path, mode: int) -> tuple[str, Path]:
    """What lies at a path, "" for none of the kinds, and its place: the folder of a file, the student in a folder."""
    if stat.S_ISDIR(mode):
        if (path / MANIFEST).is_file():
            return "bundle", path
        if (path / CONFIG).is_file():
            return "teacher", path
        if (path / OF_REPOSITORY / MANIFEST).is_file():
            return "bundle", path / OF_REPOSITORY
        return ("student", path / STUDENT) if (path / STUDENT).is_file() else ("", path)
    beside = path.parent
    if path.name in (CONFIG, *WEIGHTS) and (beside / CONFIG).is_file():
        return "teacher", beside
    of_bundle = (beside / MANIFEST).is_file()
    if path.suffix in _SUFFIXES and not (of_bundle and path.name == GOLDEN):
        return "student", path
    if of_bundle:
        return "bundle", beside
    try:
        with open_file(path) as content:
            return ("student" if content.read(2) == b"PK" else ""), path  # torch.save writes a zip archive
    except OSError as error:
        raise DfssmError(f"{path} cannot be read ({reason(error)}): copy it again") from None


def _way(kind: str, place: str, wanted: tuple[str, ...]) -> tuple[str, str, str]:
    """From `kind` at `place` to the first kind that is wanted: in words, as commands, and what comes of them.

    No commands where that lies before `kind`, or is it.
    """
    kinds = list(_KINDS)
    words, commands, result = [], [], place
    for step in kinds[kinds.index(kind) + 1 : min(map(kinds.index, wanted)) + 1]:
        word, command, left = _STEPS[step]
        words.append(word)
        commands.append(command.format(quoted(result)))
        result = left
    return " and ".join(words), " && ".join(commands), result


def _refuse_name_of_hub(path: str | Path, wanted: tuple[str, ...]) -> None:
    """DfssmError for state-spaces/mamba2-130m where no path begins like that."""
    found = _HUB.fullmatch(str(path))
    if not found or os.path.lexists(found[1]) or Path(path).suffix in _FILES:
        return
    _, commands, result = _way("teacher", found[2], wanted)
    download = f"hf download {found[1]}/{found[2]} --local-dir {found[2]}"
    commands = f"{download} && {commands}" if commands else download
    raise DfssmError(
        f"{path} does not exist here: if it is a model of the Hugging Face hub, run {commands}, then give {result}"
    )


def _output(path: str | Path, what: str, *kinds: int) -> Path:
    """The path, where nothing lies or what is of `kinds`, and a new one of the first of them can be made."""
    mode = _mode(path, f"give the name of {what} to write")
    path = Path(path)
    kind = kinds[0] if mode is None else stat.S_IFMT(mode)
    if kind not in kinds:
        found = _ODD.get(kind) or ("a folder" if kind == stat.S_IFDIR else "a file")
        raise DfssmError(f"cannot write {path}: it is {found}; give the name of {what}")
    # A file is replaced by a new one in its folder; where it is a link, in the folder of what that names.
    place = path.resolve() if path.is_symlink() else path
    into = place.parent if mode is None or kind == stat.S_IFREG else path
    if mode is None and not into.is_dir():
        if into.exists():
            raise DfssmError(f"cannot write {path}: {into} is a file; give another place")
        raise DfssmError(f"cannot write {path}: there is no folder {into}; create it first: mkdir -p {quoted(into)}")
    if not os.access(into, os.W_OK | (os.X_OK if into.is_dir() else 0), effective_ids=True):
        raise DfssmError(f"cannot write {path}: {into} is closed to you (Permission denied); give another place")
    return path


def quoted(path: str | Path) -> str:
    """As a shell reads it back."""
    return shlex.quote(os.fspath(path))


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
