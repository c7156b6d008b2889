"""The building process seen from its parent: starts `trt_build`, follows what it says, and makes errors of its ends."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfssm.base import DfssmError
from dfssm.base.child import python
from dfssm.base.files import temporary_folder

from .target import Progress
from .trt_build import MODULES, Request

OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|bad_alloc|MEM_ALLOC_FAILED|MemoryError|Cannot allocate", re.I)

# libX.so.1 -> libX.so
_VERSIONED = re.compile(r"(.+\.so)\.\d+$")


def build_engine(request: Request, progress: Progress | None = None) -> dict[str, Any]:
    """Have `request` built; returns its result. Raises DfssmError, in one line, for any other end of the process."""
    with temporary_folder("building an engine") as links:
        process = subprocess.Popen(
            python("-m", f"{__package__}.trt_build"),
            env=_environment(request.builder, links),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            with process:
                assert process.stdin and process.stdout  # they are pipes
                process.stdin.write(request.to_json())
                process.stdin.close()
                said, last = _follow(process.stdout, progress)
        finally:
            process.kill()
    if "result" in said:
        result: dict[str, Any] = said["result"]
        return result
    raise DfssmError(f"{request.builder} built no engine: {_reason(process.returncode, said.get('error'), last)}")


def _environment(builder: str, links: Path) -> dict[str, str]:
    """The environment with `links` first in LD_LIBRARY_PATH, holding the unversioned names of TensorRT's libraries.

    TensorRT's ONNX parser opens `libtensorrt_rtx.so` by that name when it meets a plugin, and ends the process if there
    is none; the Python wheels have `libtensorrt_rtx.so.1` only. LD_LIBRARY_PATH counts when a process starts.
    """
    libraries = find_spec(f"{MODULES[builder]}_libs")
    for folder in libraries.submodule_search_locations or () if libraries else ():
        for path in Path(folder).iterdir():
            if match := _VERSIONED.match(path.name):
                (links / match[1]).symlink_to(path)
    paths = [str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _follow(lines: Iterable[str], progress: Progress | None) -> tuple[dict[str, Any], str]:
    """Read the child's output to its end: (its `result` or `error`, the last other thing that it or a library said)."""
    said: dict[str, Any] = {}
    last = ""
    for line in lines:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = line
        if not isinstance(message, dict):  # a native library, writing past the logger
            message = {"log": ["", line]}
        if "progress" in message and progress:
            progress(*message["progress"])
        elif "log" in message:
            last = " ".join(message["log"][1].split()) or last
        else:
            said |= message
    return said, last


def _reason(status: int, error: str | None, last: str) -> str:
    if OUT_OF_MEMORY.search(error or last) or status == -signal.SIGKILL:
        return f"out of memory ({error or last or 'the system killed the builder'}): free some, or use a larger machine"
    if error:
        return error
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return f"the builder {how}; its last words: {last or 'none'}"
