"""Kills commands, and fills their disk, at every change that they make to a file; then looks at what is left.

    LD_PRELOAD=shim.so python driver.py FOLDER [--command NAME] [--sample N] [--lower FOLDER]

Each command writes over what an earlier one has made. At every event (shim.c says what one is) the process is killed,
or the disk is full from then on. Then: the target is the old one or the new one, whole; a full disk is an error of one
line and status 1; the next run, which nobody disturbs, succeeds, and leaves nothing but its output. Prints what was
seen; status 1 if that was anything else.

The commands run in forks of one process that has imported everything: 0.1 to 0.5 s each instead of 3 to 5.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
KILL, FULL = 0, 1
NAMES = ("dfcompile", "convert", "run --save-state", "distill")
NEVER = 1 << 40

shim = ctypes.CDLL(None)


@dataclasses.dataclass(frozen=True)
class Command:
    """`arguments` of a run that writes `target`, over a copy of `before`; `kind` reads a target: "old" or "new"?"""

    name: str
    before: Path
    target: str
    arguments: Callable[[Path], list[str]]
    kind: Callable[[Path], str]
    again: tuple[str, ...] = ()  # what the next run is given besides


@dataclasses.dataclass
class Run:
    status: int  # -9: killed
    err: str
    events: int


def run(command: Command, place: Path, event: int, mode: int, more: tuple[str, ...] = ()) -> Run:
    """The command in a fork, disturbed at an event."""
    read, write = os.pipe()
    arguments = [*command.arguments(place), *more]
    with tempfile.TemporaryFile() as err:
        if not (child := os.fork()):
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # Whatever the command may leave for its end, in a folder for temporary files too, is not what is asked for.
            shim.file_events_arm(os.fsencode(place), ctypes.c_long(event), mode)
            status = _call(command.name, arguments)
            os.write(write, str(shim.file_events_count()).encode())
            os._exit(status)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with open(read, "rb") as pipe:
            events = int(pipe.read() or 0)
        err.seek(0)
        return Run(os.waitstatus_to_exitcode(status), err.read().decode(errors="replace"), events)


def _call(name: str, arguments: list[str]) -> int:
    from dfssm.cli.main import dfcompile
    from dfssm.cli.main import main as dfssm

    try:
        (dfcompile if name == "dfcompile" else dfssm)(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 70  # a traceback
    finally:
        sys.stderr.flush()
    return 0


def disturb(command: Command, folder: Path, mode: int, sample: int, lower: Path | None) -> tuple[Counter, list[str]]:
    """What was seen, and what is a fault of it."""
    seen, faults = Counter(), []
    with _place(command, folder, lower) as place:
        done = run(command, place, NEVER, mode)
        total, clean = done.events, _names(place)
        if done.status or command.kind(place / command.target) != "new":
            return seen, [f"{command.name} alone: status {done.status}: {done.err}"]
    events = range(1, total + 1)
    for event in events if sample >= total else sorted(random.Random(0).sample(events, sample)):
        with _place(command, folder, lower) as place:
            found = []
            done = run(command, place, event, mode)
            left = command.kind(place / command.target)
            if mode == KILL and done.status != -signal.SIGKILL:
                found.append(f"it was not killed: status {done.status}")
            elif mode == FULL and done.status:
                *before, line = done.err.splitlines() or [""]
                told = ": error: " in line and "No space left on device" in line
                if done.status != 1 or not told or any("rror" in other for other in before):
                    found.append(f"status {done.status}: {done.err[-300:]!r}")
            elif done.status == 0 and left != "new":
                found.append(f"status 0, but the target is {left}")
            seen[left] += 1
            if left not in ("old", "new"):
                found.append(f"the target is {left}")
            after = run(command, place, NEVER, mode, command.again)
            if after.status == 1 and "leave out --resume" in after.err:
                after = run(command, place, NEVER, mode)
            if after.status or command.kind(place / command.target) != "new":
                found.append(f"the next run: status {after.status}: {after.err[-300:]!r}")
            elif _names(place) != clean:
                found.append(f"left: {sorted(_names(place) ^ clean)}")
            faults += [f"{command.name}, {('kill', 'full')[mode]} at {event} of {total}: {text}" for text in found]
    return seen, faults


def _names(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


@contextlib.contextmanager
def _place(command: Command, folder: Path, lower: Path | None) -> Iterator[Path]:
    """A folder with what was there before; with `lower`, that lies in the lower layer of an overlay mount."""
    place = Path(tempfile.mkdtemp(dir=folder)).resolve()
    try:
        if lower is None:
            _copy(command.before, place / command.target)
            yield place
            return
        below = Path(tempfile.mkdtemp(dir=lower))
        _copy(command.before, below / command.target)
        layers = {name: place / name for name in ("upper", "work", "merged")}
        for layer in layers.values():
            layer.mkdir()
        options = f"lowerdir={below},upperdir={layers['upper']},workdir={layers['work']}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, layers["merged"]], check=True)
        try:
            yield layers["merged"]
        finally:
            subprocess.run(["umount", layers["merged"]], check=True)
            shutil.rmtree(below)
    finally:
        shutil.rmtree(place)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def commands(work: Path) -> Iterator[Command]:
    """The commands, with the models that they work on: tiny ones, of seed 0 for what was before, 1 for what comes."""
    import numpy as np
    import tiny
    import torch

    from dfssm.base.errors import DfssmError
    from dfssm.model.checkpoint import load_student_tensors, save_student
    from dfssm.model.config import Mamba2Config
    from dfssm.model.hf_import import save_teacher
    from dfssm.model.teacher import Mamba2LM
    from dfssm.runtime.state import State
    from dfssm.targets.bundle import open_bundle

    torch.set_num_threads(1)
    tiny.write_tokenizer(work / "tokenizer.json")
    for seed in (0, 1):
        tensors = {name: torch.from_numpy(array) for name, array in tiny.tensors(seed=seed).items()}
        save_student(work / f"{seed}.pt", tiny.CONFIG, tensors)
    end = tiny.CONFIG.eos_token_id
    save_teacher(Mamba2LM(Mamba2Config(end + 1, 32, 2, d_state=8, headdim=8, eos_token_id=end)), work / "teacher")
    shutil.copy(work / "tokenizer.json", work / "teacher")
    (work / "text.txt").write_text("hello world or so. " * 200)

    def read(path: Path, tell: Callable[[Path], str]) -> str:
        if not path.exists():
            return "absent"
        try:
            return tell(path)
        except DfssmError as error:
            return "refused" if "sha256" in str(error) or " bytes, its manifest" in str(error) else f"damaged: {error}"

    def made(*arguments: object) -> None:
        name, *rest = map(str, arguments)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            status = _call(name, rest)
        if status:
            raise SystemExit(f"{arguments}: status {status}: {err.getvalue()}")

    made("dfcompile", work / "0.pt", "--target", "ort-cpu", "-o", work / "old", "--no-verify")
    old = open_bundle(work / "old").manifest.files
    yield Command(
        "dfcompile", work / "old", "bundle",
        lambda place: [str(work / "1.pt"), "--target", "ort-cpu", "-o", str(place / "bundle"), "--force"],
        lambda path: read(path, lambda path: "old" if open_bundle(path).manifest.files == old else "new"),
    )  # fmt: skip

    made("dfssm", "convert", work / "teacher", "-o", work / "old.pt", "--rank", 2)

    def rank(path: Path) -> str:
        return "old" if load_student_tensors(path)[0].rank == 2 else "new"

    for suffix in ("pt", "safetensors"):
        made("dfssm", "convert", work / "teacher", "-o", work / f"old.{suffix}", "--rank", 2)
        yield Command(
            "convert", work / f"old.{suffix}", f"model.{suffix}",
            lambda place, suffix=suffix: [
                "convert", str(work / "teacher"), "-o", str(place / f"model.{suffix}"), "--rank", "3"
            ],
            lambda path: read(path, rank),
        )  # fmt: skip

    def save(prompt: str, path: Path) -> list[str]:
        return ["run", str(work / "old"), "-p", prompt, "-n", "2", "--save-state", str(path), "--threads", "1"]

    made("dfssm", *save("hello", work / "old.state"))

    def tokens(path: Path) -> str:
        state = State.load(path)
        return "old" if np.array_equal(state.tokens, State.load(work / "old.state").tokens) else "new"

    yield Command(
        "run --save-state", work / "old.state", "a.state",
        lambda place: save("hello world hello", place / "a.state"),
        lambda path: read(path, tokens),
    )  # fmt: skip

    (work / "empty").mkdir()
    size = "--tokens 16 --batch 2 --total-tokens 64 --held-out 0.1 --rank 2 --threads 1".split()

    def student(path: Path) -> str:
        if not (path / "model.pt").exists():
            return "old"  # not yet made
        load_student_tensors(path / "model.pt")
        return "new"

    yield Command(
        "distill", work / "empty", "out",
        lambda place: [
            "distill", str(work / "teacher"), "--data", str(work / "text.txt"), "-o", str(place / "out"), *size
        ],
        lambda path: read(path, student),
        ("--resume",),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the file system to try")
    parser.add_argument("--lower", type=Path, help="try an overlay mount, with the old target below this folder")
    parser.add_argument("--command", action="append", choices=NAMES, help="only these")
    parser.add_argument("--sample", type=int, default=NEVER, help="at most so many events of each")
    given = parser.parse_args()
    for module in ("torch", "onnx", "onnxruntime", "tokenizers", "onnx_ir", "dfssm.distill.run"):
        importlib.import_module(module)
    faults = []
    with tempfile.TemporaryDirectory() as work:
        for command in commands(Path(work)):
            if given.command and command.name not in given.command:
                continue
            for mode in (KILL, FULL):
                seen, found = disturb(command, given.folder, mode, given.sample, given.lower)
                faults += found
                counts = ", ".join(f"{number} {what}" for what, number in seen.items())
                print(f"{command.name} ({command.target}), {('kill', 'full disk')[mode]}: {counts}", flush=True)
    for fault in faults:
        print("fault:", fault)
    print(f"{len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
