"""What an engine takes of the GPU's memory when all its rows run: the builder's figures, and what the runtime adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .trt_build import Profile


def memory(built: dict[str, int | None], graph: Path, profiles: tuple[Profile, ...]) -> dict[str, Any]:
    """Bytes, as in the manifest's `engine.memory` (docs/trt.md). `built`: what the builder says of `weights` and
    `activations`, None where it did not; `graph`: the step graph.

    Contexts run in turn and share the activations. What CUDA and TensorRT take for themselves is not in it.
    """
    import onnx

    step = onnx.load(graph, load_external_data=False).graph
    shapes = {value.name: value.type.tensor_type for value in (*step.input, *step.output)}
    vocab = shapes["logits"].shape.dim[-1].dim_value
    rows = max(profile.rows for profile in profiles)
    states = rows * sum(_row_bytes(of) for name, of in shapes.items() if "." in name and "_out." not in name)
    logits = 4 * vocab * (rows + sum(profile.rows * profile.logits for profile in profiles if profile.logits > 1))
    parts = built | {"states": states, "logits": logits}
    known = [size for size in parts.values() if size is not None]
    return {"rows": rows, **parts, "total": sum(known) if len(known) == len(parts) else None}


def _row_bytes(of: Any) -> int:
    from onnx.helper import tensor_dtype_to_np_dtype

    sizes = [dim.dim_value for dim in of.shape.dim[1:]]
    return int(np.prod(sizes)) * tensor_dtype_to_np_dtype(of.elem_type).itemsize
