"""Wrong paths: every argument of every command that names one, with everything that may lie there instead."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import run_commands

from dfssm.base import DfssmError, paths

HUB = "state-spaces/mamba2-130m"
LONG = "n" * 300

DATA = ("--data", "notes.md")
ARGUMENTS = {
    "student": [
        ["dfcompile", "?", "--target", "ort-cpu", "-o", "new"],
        ["dfcompile", "?", "--target", "trt"],
        ["dfssm", "compare", "b", "?"],
    ],
    "bundle": [
        ["dfssm", "run", "?", "-p", "a"],
        ["dfssm", "bench", "?"],
        ["dfssm", "compare", "?", "model.pt"],
        ["dfssm", "verify", "?"],
    ],
    "teacher": [
        ["dfssm", "convert", "?", "-o", "new.pt"],
        ["dfssm", "distill", "?", *DATA, "-o", "new"],
        ["dfssm", "distill", "?", *DATA, "-o", "new", "--plan"],
    ],
    "student or bundle": [["dfssm", "inspect", "?"]],
    "any model": [
        ["dfssm", "eval", "perplexity", "?", *DATA],
        ["dfssm", "eval", "perplexity", "b", *DATA, "--reference", "?"],
        ["dfssm", "eval", "tasks", "?", "--tasks", "piqa", "--data", "empty"],
    ],
    "tokenizer": [
        ["dfcompile", "model.pt", "--target", "ort-cpu", "-o", "new", "--tokenizer", "?"],
        ["dfssm", "distill", "teacher", *DATA, "-o", "new", "--tokenizer", "?"],
        ["dfssm", "eval", "perplexity", "b", *DATA, "--tokenizer", "?"],
        ["dfssm", "eval", "tasks", "b", "--tasks", "piqa", "--data", "empty", "--tokenizer", "?"],
    ],
    "other file": [
        ["dfssm", "run", "b", "--load-state", "?"],
        ["dfssm", "init", "--config", "?", "-o", "new.pt"],
    ],
    "folder": [["dfssm", "eval", "tasks", "b", "--tasks", "piqa", "--data", "?"]],
    "file or folder": [
        ["dfssm", "distill", "teacher", "--data", "?", "-o", "new"],
        ["dfssm", "eval", "perplexity", "b", "--data", "?"],
    ],
    "new file": [
        ["dfssm", "run", "b", "-p", "a", "--save-state", "?"],
        ["dfssm", "init", "--preset", "mamba2-130m", "-o", "?"],
        ["dfssm", "convert", "teacher", "-o", "?"],
    ],
    "new folder": [
        ["dfcompile", "model.pt", "--target", "ort-cpu", "-o", "?"],
        ["dfssm", "distill", "teacher", *DATA, "-o", "?"],
    ],
}
"""What is wanted at the place of "?"."""

ALWAYS = {
    "": "an empty path names nothing: give ",
    "nowhere": "nowhere does not exist: give ",
    "notes.md/x": "notes.md/x does not exist: give ",
    "no/where.pt": "no/where.pt does not exist: give ",
    "lost": "lost does not exist, but as a link to gone: give ",
    "loop": "loop cannot be read (Too many levels of symbolic links): give ",
    LONG: f"{LONG} cannot be read (File name too long): give ",
    "pipe": "pipe is a pipe: give ",
    "socket": "socket is a socket: give ",
    "/dev/zero": "/dev/zero is a device: give ",
}
DOWNLOAD = f"run hf download {HUB} --local-dir mamba2-130m"
CONVERT, COMPILE = "dfssm convert {} -o model.pt", "dfcompile {} --target ort-cpu"
STUDENT, TEACHER = "give a model.pt or .safetensors", "give a checkpoint folder (config.json, model.safetensors)"
BUNDLE = "give a bundle (a folder that dfcompile made)"
ORIGIN = "give what it was made from, a"
OUTPUTS = {
    "": "an empty path names nothing: give the name of a ",
    "no/where/new": "cannot write no/where/new: there is no folder no/where; create it first: mkdir -p no/where",
    "notes.md/new": "cannot write notes.md/new: notes.md is a file; give another place",
    "socket": "cannot write socket: it is a socket; give the name of a ",
    "astray": "cannot write astray: there is no folder {HERE}/no/where; create it first: mkdir -p {HERE}/no/where",
    "loop": "loop cannot be read (Too many levels of symbolic links): give the name of a ",
}
WRONG = {
    "student": ALWAYS
    | {
        "b": f"b is a bundle, not a student: {ORIGIN} model.pt",
        "b/model.onnx": f"b/model.onnx is a file of a bundle, not a student: {ORIGIN} model.pt",
        "b/golden.safetensors": f"b/golden.safetensors is a file of a bundle, not a student: {ORIGIN} model.pt",
        "teacher": f"teacher is a Mamba-2 checkpoint, not a student: convert or distill it first: {CONVERT}",
        "teacher/config.json": f"is a file of a checkpoint, not a student: convert or distill it first: {CONVERT}",
        "trained": "trained is a folder with a student: give trained/model.pt",
        "empty": f"empty is not a student: {STUDENT}",
        "notes.md": f"notes.md is not a student: {STUDENT}",
        HUB: f"{DOWNLOAD} && {CONVERT.format('mamba2-130m')}, then give model.pt",
    },
    "bundle": ALWAYS
    | {
        "b/model.onnx": "b/model.onnx is a file of a bundle: give the folder b",
        "b/manifest.json": "b/manifest.json is a file of a bundle: give the folder b",
        "b/golden.safetensors": "b/golden.safetensors is a file of a bundle: give the folder b",
        "model.pt": f"model.pt is a student, not a bundle: compile it first: {COMPILE.format('model.pt')}",
        "a name.pt": f"a name.pt is a student, not a bundle: compile it first: {COMPILE.format(repr('a name.pt'))}",
        "trained": f"is a folder with a student, not a bundle: compile it first: {COMPILE.format('trained/model.pt')}",
        "teacher": f"convert or distill it and compile it first: {CONVERT} && {COMPILE.format('model.pt')}",
        "served": "served is a Triton repository: give the folder served/dfssm/1",
        "empty": f"empty is not a bundle: it has no manifest.json; {BUNDLE}",
        "notes.md": f"notes.md is not a bundle: {BUNDLE}",
        HUB: f"{DOWNLOAD} && {CONVERT.format('mamba2-130m')} && {COMPILE.format('model.pt')}, then give model-ort-cpu",
    },
    "teacher": ALWAYS
    | {
        "b": f"b is a bundle, not a Mamba-2 checkpoint: {ORIGIN} checkpoint folder",
        "b/manifest.json": f"is a file of a bundle, not a Mamba-2 checkpoint: {ORIGIN} checkpoint folder",
        "model.pt": f"model.pt is a student, not a Mamba-2 checkpoint: {ORIGIN} checkpoint folder",
        "empty": f"empty is not a Mamba-2 checkpoint: it has no config.json; {TEACHER}",
        "notes.md": f"notes.md is not a Mamba-2 checkpoint: {TEACHER}",
        HUB: f"{HUB} does not exist here: if it is a model of the Hugging Face hub, {DOWNLOAD}, then give mamba2-130m",
    },
    "student or bundle": ALWAYS
    | {
        "b/model.onnx": "b/model.onnx is a file of a bundle: give the folder b",
        "trained": "trained is a folder with a student: give trained/model.pt",
        "teacher": f"is a Mamba-2 checkpoint, not a student or a bundle: convert or distill it first: {CONVERT}",
        "empty": "empty is not a student or a bundle: it has no manifest.json; give ",
        HUB: f"{DOWNLOAD} && {CONVERT.format('mamba2-130m')}, then give model.pt",
    },
    "any model": ALWAYS
    | {
        "b/model.onnx": "b/model.onnx is a file of a bundle: give the folder b",
        "trained": "trained is a folder with a student: give trained/model.pt",
        "empty": f"it has no manifest.json and no config.json; {BUNDLE}, a checkpoint folder (",
        "notes.md": "notes.md is not a bundle, a Mamba-2 checkpoint or a student: give ",
        HUB: f"{DOWNLOAD}, then give mamba2-130m",
    },
    "tokenizer": ALWAYS
    | {"empty": "empty is a folder: give ", "teacher": "teacher is a folder: give teacher/tokenizer.json"},
    "other file": ALWAYS | {"empty": "empty is a folder: give "},
    "folder": ALWAYS | {"notes.md": "notes.md is a file: give --data the folder of the questions"},
    "file or folder": ALWAYS
    | {"empty": "empty: no file in it ends in .txt, .jsonl, .ndjson, .parquet; name the files"},
    "new file": OUTPUTS | {"empty": "cannot write empty: it is a folder; give the name of a file"},
    "new folder": OUTPUTS
    | {
        "notes.md": "cannot write notes.md: it is a file; give the name of a folder",
        "pipe": "cannot write pipe: it is a pipe; give the name of a folder",
        "/dev/null": "cannot write /dev/null: it is a device; give the name of a folder",
    },
}
CASES = [
    ([path if part == "?" else part for part in command], message.replace("{}", "teacher"))
    for wanted, commands in ARGUMENTS.items()
    for command in commands
    for path, message in WRONG[wanted].items()
]


def fill(folder: Path) -> None:
    """One of each kind of thing, by its name and its first bytes; none is read further."""
    for name in ("b", "teacher", "trained", "empty", "served/dfssm/1"):
        (folder / name).mkdir(parents=True)
    for name in (
        "served/dfssm/1/manifest.json",
        "b/manifest.json",
        "b/model.onnx",
        "b/golden.safetensors",
        "teacher/config.json",
    ):
        (folder / name).write_text("{}")
    (folder / "teacher/tokenizer.json").write_text("{}")
    for name in ("model.pt", "a name.pt", "trained/model.pt", "teacher/model.safetensors"):
        (folder / name).write_bytes(b"PK")
    (folder / "notes.md").write_text("notes")
    (folder / "lost").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    (folder / "astray").symlink_to("no/where/new")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, which other users may not enter
        os.chmod(name, 0o755)
        fill(Path(name))
        yield Path(name)


@pytest.fixture(scope="module")
def results(folder):
    files = sorted(os.path.join(".", path.relative_to(folder)) for path in folder.rglob("*"))
    return [files, *run_commands([command for command, _ in CASES], folder)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(command)[:60] for command, _ in CASES])
def test_a_wrong_path_is_one_line_before_anything_slow(results, folder, index):
    command, message = CASES[index]
    message = message.replace("{HERE}", str(folder.resolve()))
    files, done = results[0], results[1 + index]
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"{command[0]}: error: ") and done.err.count("\n") == 1 and done.err.endswith("\n")
    assert message in done.err
    assert done.heavy == [] and done.files == files


def test_a_line_break_in_a_name_is_none_in_the_line(folder):
    (done,) = run_commands([["dfssm", "inspect", "no\nwhere"]], folder)
    assert done.err.startswith("dfssm: error: no where does not exist: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("command", [["main", "convert"], ["dfcompile", "--target", "ort-cpu"]])
def test_the_process_of_a_user(folder, command):
    function, *arguments = command
    code = f"import sys, dfssm.cli.main as m\ntry: m.{function}(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    more = ["-o", "new.pt"] if "convert" in arguments else []
    run = [sys.executable, "-c", code, *arguments, b"caf\xe9", *more]
    done = subprocess.run(run, cwd=folder, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"False\n")
    assert rb": error: caf\udce9 does not exist: give a " in done.stderr and done.stderr.count(b"\n") == 1


@pytest.fixture
def no_root():
    """Not root, to whom nothing is forbidden."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def closed(folder):
    """The same things, closed to others and to their owner."""
    names = {"b": 0, "teacher": 0, "model.pt": 0, "empty": 0o555}
    modes = {name: (folder / name).stat().st_mode for name in names}
    for name, mode in names.items():
        (folder / name).chmod(mode)
    yield folder
    for name, mode in modes.items():
        (folder / name).chmod(mode)


@pytest.mark.parametrize(
    "check, name, message",
    [
        (paths.bundle, "b", "b cannot be read (Permission denied): have its owner run chmod a+rX "),
        (paths.bundle, "b/model.onnx", "b/model.onnx cannot be read (Permission denied): give a bundle"),
        (paths.teacher, "teacher", "teacher cannot be read (Permission denied): have its owner run chmod a+rX "),
        (paths.student, "model.pt", "model.pt cannot be read (Permission denied): have its owner run chmod a+rX "),
        (
            paths.output_file,
            "empty/new.pt",
            ": {}/empty is closed to you (Permission denied); give another place",
        ),
        (paths.output_folder, "empty", ": {}/empty is closed to you (Permission denied); give another place"),
        (paths.output_file, "b/new.pt", "b/new.pt cannot be read (Permission denied): give the name of a file"),
    ],
)
def test_what_is_closed_to_the_user(closed, no_root, check, name, message):
    with pytest.raises(DfssmError) as caught:
        check(closed / name)
    assert message.replace("{}", str(closed)) in str(caught.value)


def test_what_is_right_is_taken(folder):
    assert paths.bundle(folder / "b") == folder / "b"
    assert paths.student(f"{folder}/model.pt") == folder / "model.pt"
    for name in ("", "config.json", "model.safetensors"):
        assert paths.teacher(folder / "teacher" / name) == folder / "teacher"
    assert paths.file(folder / "notes.md", "notes") == folder / "notes.md"
    assert paths.output_file(folder / "new.pt") == folder / "new.pt"
    assert paths.output_file(folder / "model.pt") == folder / "model.pt"
    assert paths.output_folder(folder / "empty") == folder / "empty"
    for name in ("pipe", "/dev/null", "/dev/stdout"):  # written through
        assert paths.output_file(folder / name) == folder / name


def test_a_student_by_its_first_bytes(tmp_path):
    (tmp_path / "student").write_bytes(b"PK")
    assert paths.find(tmp_path / "student", "bundle", "student") == ("student", tmp_path / "student")


def test_a_name_as_on_the_hub_below_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state-spaces").mkdir()
    with pytest.raises(DfssmError, match="^state-spaces/mamba2-130m does not exist: give a bundle"):
        paths.bundle(HUB)
