"""Opening a step graph in ONNX Runtime, the part that all targets running there share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from mmap import ACCESS_READ, MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE
from mmap import mmap as map_file
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfssm.base.errors import DfssmError, reason
from dfssm.base.files import temporary_folder
from dfssm.base.hashing import on_threads
from dfssm.base.numbers import require_whole

from .bundle import DATA
from .files import Files, opened
from .initializers import externals

if TYPE_CHECKING:
    import onnxruntime

# For each CPU. More threads only wait for each other; a hundred thousand of them are never all started.
MOST_THREADS = 4

_PIECE = 1 << 22  # bytes of the weights that one thread reads at a time


def session_options(threads: int, profile: str = "") -> onnxruntime.SessionOptions:
    """Options for a step graph; `threads` = 0 lets ONNX Runtime take one a physical core. `profile`: how the name of
    the file begins that `session.end_profiling` writes.
    """
    import onnxruntime

    most = MOST_THREADS * (os.cpu_count() or 1)
    require_whole("threads", threads, 0, most, "0 = one a core")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile
    # A step is a chain: no two nodes of it can run side by side.
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads that wait for the next node spin 200 us and sleep then, and none spins after a run. Of one decode step of
    # 1.3B on two cores this took 24.5 ms, ONNX Runtime's default 25.4, no spinning 26.9; beside a busy neighbour 87
    # against 108. The default burns 50 ms of CPU after each run, in which the application could work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
    # Errors are raised; a warning about `logits_to_keep`, an input with a default on purpose, would greet every user.
    options.log_severity_level = 4
    return options


def create_session(
    folder: str | Path | Files, model: str, options: onnxruntime.SessionOptions, mmap: bool = True, **keywords: Any
) -> onnxruntime.InferenceSession:
    """The session of the graph `model` in `folder` on the CPU, over weights that are mapped, or read into memory.

    ONNX Runtime gets what was read of the files that `folder` has open, and opens none by itself: so these may be links
    to anywhere, and are those that were checked. Raises DfssmError when it refuses the graph.
    """
    import onnxruntime

    files = opened(folder)
    path = files.folder / model
    graph = files.read(model)
    content = files.use(DATA, _mapped if mmap else _in_memory)
    try:
        weights = {weight.name: weight.of(content) for weight in externals(graph)}
    except ValueError as error:
        raise DfssmError(f"{path} cannot be read ({error}): compile the model again") from None
    # Of arrays that are ours: the session neither copies nor keeps them.
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    with _place_of_weights(files) as place:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], **keywords)
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise DfssmError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {one_line(error)}") from error
    session.dfssm_weights, session.dfssm_path = values, path
    return session


def run_error(session: onnxruntime.InferenceSession, error: Exception) -> DfssmError:
    """What to raise where a run of `session` ended with `error`: of a graph whose nodes do not fit each other, say."""
    text = one_line(error)
    remedy = "free memory for it" if "allocate" in text else "compile the model again"
    return DfssmError(f"ONNX Runtime cannot run {session.dfssm_path} ({text}): {remedy}")


@contextmanager
def _place_of_weights(files: Files) -> Iterator[str]:
    """A folder where ONNX Runtime finds a file of weights: it does not read it, but wants it to be there, and to be no
    link to another folder. One of ours where the bundle's is a link, or being moved.
    """
    try:
        place = str(files.folder.absolute())
        place.encode()
        if files.in_place and not (files.folder / DATA).is_symlink():
            yield place
            return
    except UnicodeEncodeError:  # a path whose bytes are not UTF-8
        pass
    with temporary_folder(f"{files.folder / DATA}, a link or of an odd name,") as folder:
        (folder / DATA).touch()
        yield str(folder)


def _mapped(file: BufferedReader) -> np.ndarray:
    size = os.fstat(file.fileno()).st_size
    if not size:
        return np.empty(0, np.uint8)
    pages = map_file(file.fileno(), size, access=ACCESS_READ)
    _prefer_large(pages)
    return np.frombuffer(pages, np.uint8)


def _prefer_large(pages: map_file) -> None:
    """Ask for pages of 2 MB, of which a core reads weights faster: memory is, a file where its system has such."""
    with suppress(OSError):  # of a kernel without them
        pages.madvise(MADV_HUGEPAGE)


def _in_memory(file: BufferedReader) -> np.ndarray:
    handle, size = file.fileno(), os.fstat(file.fileno()).st_size
    # Whole pages: the weights are aligned as in the file.
    pages = map_file(-1, size or 1, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    _prefer_large(pages)
    memory = memoryview(pages)[:size]

    def read(start: int) -> None:
        at, end = start, min(start + _PIECE, size)
        while at < end and (count := os.preadv(handle, [memory[at:end]], at)):
            at += count

    on_threads(read, range(0, size, _PIECE))
    return np.frombuffer(memory, np.uint8)


def one_line(error: Exception) -> str:
    """The first line of an ONNX Runtime error, without its numeric prefix."""
    text = reason(error)
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
