"""Opening a step graph in ONNX Runtime, the part that all targets running there share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfssm.opset import DfssmError

if TYPE_CHECKING:
    import onnxruntime

# For each CPU. More threads only wait for each other; a hundred thousand of them are never all started.
MOST_THREADS = 4


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for a step graph; `threads` = 0 lets ONNX Runtime take one a physical core."""
    import onnxruntime

    most = MOST_THREADS * (os.cpu_count() or 1)
    if not 0 <= threads <= most:
        raise DfssmError(f"threads is {threads}: give 1 to {most} on this machine, or 0 for one a core")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A step is a chain: no two nodes of it can run side by side.
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads that wait for the next node spin 200 us and sleep then, and none spins after a run. Of one decode step of
    # 1.3B on two cores this took 24.5 ms, ONNX Runtime's default 25.4, no spinning 26.9; beside a busy neighbour 87
    # against 108. The default burns 50 ms of CPU after each run, in which the application could work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
    # Errors only: a warning about `logits_to_keep`, an input with a default on purpose, would greet every user.
    options.log_severity_level = 3
    return options


def create_session(model: Path, options: onnxruntime.SessionOptions, **keywords: Any) -> onnxruntime.InferenceSession:
    """The session of the graph `model` on the CPU. Raises DfssmError when ONNX Runtime refuses it."""
    import onnxruntime

    if not model.is_file():
        raise DfssmError(f"{model} is missing: {model.parent} is not a complete bundle, compile the model again")
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"], **keywords)
    except Exception as error:  # ONNX Runtime's errors have no common base but Exception
        raise DfssmError(f"ONNX Runtime {onnxruntime.__version__} cannot open {model}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The first line of an ONNX Runtime error, without its numeric prefix."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
