"""What the harness needs on a machine that has torch and nothing of dfssm, in one folder:

    python -m gpu_harness.pack FOLDER [--library libdfssm_trt.so]

The plugin library, the driver, cases with what opset's references make of them, the lowered demo graph with what the
ort-cpu bundle makes of its tokens, and the lowered graph of the 1.3B without its weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nodes
import numpy as np
import onnx
import student_ref
import tiny
import torch
from gpu.ops import whole
from plugins_trt import adapter, emulated, fused, lowered
from plugins_trt.fused import FusedCase
from trt_graphs import DEMO, step, write_step

from dfssm.compiler.pipeline import Request, compile_model
from dfssm.export.graph import build_step_graph
from dfssm.export.writer import write_model
from dfssm.model.config import DFSSMConfig, preset
from dfssm.opset import DOMAIN, OPS
from dfssm.opset.cases import Case
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.schema import STATE_DTYPES
from dfssm.opset.tolerances import model_tolerance
from dfssm.runtime.cuda import MOST_LARGEST
from dfssm.runtime.sampling import divisor, largest, total_weight
from dfssm.targets import get_target
from dfssm.targets.trt_build import LOGITS_AT
from dfssm.targets.trt_lowering import lower
from dfssm.targets.trt_plugins import FUSED

HERE = Path(__file__).parent
PREFILL, STEPS = 26, 6
CARRIED = 3, 7, 3
"""Rows, tokens of the prompt and steps with states that stay on the device."""

MEDIAN = 1e-5
"""Most calls have no activation on a tie of int8: they differ by the order of fp32 sums."""

ON_DEVICE = ("__main__.py", "plugins.py", "graph.py", "checks.py", "speed.py", "baselines.py")
"""The modules that import nothing but torch."""


def driver(folder: Path) -> Path:
    """driver.cpp compiled into `folder`; it serves the emulation and a GPU alike."""
    out = folder / "libgpu_harness.so"
    flags = "-std=c++17 -O2 -fPIC -shared -Wall -Wextra -fvisibility=hidden".split()
    flags += [f"-isystem{place}" for place in (emulated.EMULATION, adapter.headers()[adapter.TRT_HEADER])]
    command = [emulated.compiler(), *flags, HERE / "driver.cpp", "-ldl", "-o", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return out


def tensors_of(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array).copy()) for name, array in arrays.items()}


def export_case(case: Case | FusedCase) -> dict[str, Any]:
    """Inputs as TensorRT's parser sees them, outputs and bounds of the relative error."""
    inputs = case.inputs()
    if isinstance(case, FusedCase):
        given, attributes = fused.lowered_inputs(case), FUSED[case.op].resolve(case.attributes)
        expected = case.expected(inputs)
    else:
        given, attributes = lowered.lowered_inputs(case), lowered.lowered_attributes(case)
        sizes = OPS[case.op].check(inputs, case.attributes) | {"state": case.state_dtype}
        exact = isinstance(case, type(whole(case)))
        names = nodes.output_names(case)
        expected = {
            name: (output, None if exact else ALL_OPS[case.op].tolerance(sizes, name))
            for name, output in zip(names, nodes.expected_outputs(case, inputs), strict=True)
        }
    return {
        "id": case.id,
        "op": case.op,
        "attributes": {name: value for name, value in attributes.items() if name not in lowered.PLUGIN},
        "inputs": tensors_of(given),
        "outputs": tensors_of({name: output for name, (output, _) in expected.items()}),
        "bounds": {name: tolerance.relative if tolerance else 0.0 for name, (_, tolerance) in expected.items()},
    }


def table() -> list[Case | FusedCase]:
    """Every case that the plugins are tested with elsewhere, and products of whole numbers, which are exact."""
    products = [case for case in lowered.CANONICAL if case.op in ("BinaryScaffoldMatMul", "Int8MatMul")]
    exact = [whole(case) for case in products if case.kind == "normal"]
    return [*lowered.CANONICAL, *fused.CASES, *exact]


def large() -> list[Case | FusedCase]:
    """The sizes of the 1.3B, where the kernels take other paths; too slow for every run over the emulation."""
    c = DFSSMConfig.from_teacher(preset("mamba2-1.3b"))
    wide = dict(K=c.d_model, M=c.d_in_proj, R=c.rank, C=c.conv_dim, W=c.d_conv)
    add = dict(K=c.d_inner, M=c.d_model, R=c.rank)
    one, prompt = dict(B=1, T=1), dict(B=1, T=80)
    scan = dict(P=c.headdim, N=c.d_state)
    return [
        *(FusedCase("NormScaffoldConv", call | wide, {"x_start": c.d_inner}) for call in (one, prompt)),
        *(FusedCase("GatedNormScaffoldAdd", call | add, {"z_start": 0}) for call in (one, dict(B=1, T=20))),
        *(Case("SelectiveScanStep", one | scan | dict(H=c.nheads, state=state)) for state in ("float16", "int8")),
        *(Case("SelectiveScanStep", prompt | scan | dict(H=16, state=state)) for state in STATE_DTYPES.values()),
        Case("Int8MatMul", dict(B=3, T=1, K=c.d_model, M=515)),
    ]


def choices(vocab: int, most: int) -> list[dict[str, Any]]:
    """Of `dfssm_largest` and `dfssm_total_weight`: distinct logits, ties, some that are no numbers."""
    rng = np.random.default_rng(0)
    rows = {"distinct": rng.standard_normal((2, vocab)), "ties": rng.integers(-2, 3, (2, vocab))}
    rows["not finite"] = rng.choice([np.nan, np.inf, -np.inf, -1, 1], (2, vocab))
    made = []
    for kind, values in rows.items():
        logits = values.astype(np.float32)
        given = {"kind": kind, **tensors_of({"logits": logits})}
        for count in (1, most):
            tokens, values = map(np.stack, zip(*(largest(row, count) for row in logits), strict=True))
            made.append(given | {"count": count, **tensors_of({"tokens": tokens, "values": values})})
        temperatures = 0.3, 1.7
        divisors = np.array([*map(divisor, temperatures)])
        totals = np.array([total_weight(*row) for row in zip(logits, temperatures, strict=True)])
        made.append(given | tensors_of({"divisors": divisors, "totals": totals}))
    return made


def export_graph(path: Path, synthetic: bool = False) -> dict[str, Any]:
    """A lowered graph as graph.py reads it. `synthetic`: the large integer weights as (dtype, shape) only."""
    graph = onnx.load(path, load_external_data=True).graph
    weights: dict[str, Any] = {}
    same: dict[tuple, torch.Tensor] = {}  # the layers of the synthetic model share their floats, in the file too
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        value = torch.from_numpy(array.copy())
        if synthetic and array.dtype in (np.int8, np.int32) and array.nbytes > 1024:
            weights[tensor.name] = (value.dtype, tuple(value.shape))
        else:
            weights[tensor.name] = same.setdefault((array.dtype, array.shape, array.tobytes()), value)
    return {
        "weights": weights,
        "states": {
            value.name: (_torch_type(value.type.tensor_type.elem_type), _row(value))
            for value in graph.input
            if value.name not in ("input_ids", LOGITS_AT)
        },
        "nodes": [
            {
                "op": node.op_type,
                "name": node.name,
                "plugin": node.domain == DOMAIN,
                "inputs": list(node.input),
                "outputs": list(node.output),
                "attributes": {a.name: _attribute(a) for a in node.attribute if a.name not in lowered.PLUGIN},
            }
            for node in graph.node
        ],
    }


def _torch_type(element: int) -> torch.dtype:
    return torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(element))).dtype


def _row(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "to":
        return _torch_type(value)
    return value.decode() if isinstance(value, bytes) else value


def export_demo(state_dtype: str, folder: Path) -> dict[str, Any]:
    """The lowered demo graph, and what the ort-cpu bundle makes of a prompt and steps."""
    bundle = folder / "ort-cpu"
    compile_model(Request(DEMO, "ort-cpu", bundle, state_dtype=state_dtype, verify=False))
    reference = get_target("ort-cpu").open_session(bundle, threads=1)
    config, _ = write_step(folder / "trt", "demo", state_dtype)
    lower(folder / "trt" / "model.onnx", folder / "trt" / "lowered.onnx")

    def run(rows: int, prompt: int, steps: int) -> list[dict[str, Any]]:
        ids = np.random.default_rng(4).integers(0, config.vocab_size, (rows, prompt + steps))
        states = student_ref.zero_states(config, rows, state_dtype)
        before, calls = tensors_of(states), []
        for call in np.split(ids, range(prompt, prompt + steps), axis=1):
            logits, states = step(reference, call, states)
            after = tensors_of(states)
            made = {"ids": torch.from_numpy(call.copy()), "logits": torch.from_numpy(logits[:, -1:].copy())}
            calls.append(made | {"states": before, "new_states": after})
            before = after
        return calls

    return {
        "graph": export_graph(folder / "trt" / "lowered.onnx"),
        "bound": model_tolerance(config.n_layer, config.d_model).relative,
        "median": MEDIAN,
        "calls": run(1, PREFILL, STEPS),
        "carried": [{"ids": call["ids"], "logits": call["logits"]} for call in run(*CARRIED)],
    }


def export_large_model(state_dtype: str, folder: Path) -> dict[str, Any]:
    """The lowered graph of the 1.3B. Its floats are those of one layer; the integers are left to the device."""
    config = DFSSMConfig.from_teacher(preset("mamba2-1.3b"))
    one = tiny.tensors(dataclasses.replace(config, n_layer=1))
    layer = {name.removeprefix("layers.0"): value for name, value in one.items() if name.startswith("layers.0.")}
    every = {f"layers.{i}{name}": value for i in range(config.n_layer) for name, value in layer.items()}
    write_model(build_step_graph(config, one | every, state_dtype=state_dtype), folder / "model.onnx")
    lower(folder / "model.onnx", folder / "lowered.onnx")
    return export_graph(folder / "lowered.onnx", synthetic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--library", type=Path, help="default: the one over the host emulation")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    driver(folder)
    if arguments.library:
        shutil.copy(arguments.library, folder)
    torch.save([export_case(case) for case in table()], folder / "cases.pt")
    torch.save([export_case(case) for case in large()], folder / "large.pt")
    torch.save(choices(preset("mamba2-1.3b").vocab_size, MOST_LARGEST), folder / "largest.pt")
    for state_dtype in STATE_DTYPES:
        with tempfile.TemporaryDirectory() as place:
            torch.save(export_demo(state_dtype, Path(place)), folder / f"demo_{state_dtype}.pt")
        with tempfile.TemporaryDirectory() as place:
            torch.save(export_large_model(state_dtype, Path(place)), folder / f"1.3b_{state_dtype}.pt")
    target = folder / HERE.name
    target.mkdir(exist_ok=True)
    for module in ON_DEVICE:
        shutil.copy(HERE / module, target)


if __name__ == "__main__":
    main()
