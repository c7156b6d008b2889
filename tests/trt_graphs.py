"""What the tests of the lowering start from: step graphs on disk, and how they are run in ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnxruntime
import student_ref
import tiny

from dfssm.export.graph import build_step_graph
from dfssm.export.writer import write_model
from dfssm.model.checkpoint import load_student_tensors

DEMO = Path(__file__).parents[1] / "examples" / "demo" / "model.pt"


def write_step(folder: Path, name: str, state_dtype: str = "fp16") -> tuple:
    """The step graph of a student of the grid, or of the demo, as folder/model.onnx: (config, tensors)."""
    if name == "demo":
        config, tensors = load_student_tensors(DEMO)
        tensors = {key: tensor.numpy() for key, tensor in tensors.items()}
    else:
        config = student_ref.config(name)
        tensors = tiny.tensors(config)
    folder.mkdir(exist_ok=True)
    write_model(build_step_graph(config, tensors, state_dtype=state_dtype), folder / "model.onnx")
    return config, tensors


def stock_session(path: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime with no rewriting: it would turn a blocked DequantizeLinear and MatMul into another arithmetic."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def step(session: onnxruntime.InferenceSession, ids: np.ndarray, states: dict, **more) -> tuple[np.ndarray, dict]:
    """One call with the inputs `more`: logits, and the states by the names of the inputs."""
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input_ids": ids, **more, **states}), strict=True))
    return found["logits"], {name: found[name.replace(".", "_out.")] for name in states}


def widened(states: dict, name: str) -> np.ndarray:
    """A state as the numbers it stands for."""
    value = states[name].astype(np.float32)
    scale = states.get(name.replace("ssm_state", "ssm_scale")) if name.startswith("ssm_state") else None
    return value if scale is None else value * scale[..., None]
