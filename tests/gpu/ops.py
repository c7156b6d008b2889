"""Engines of single plugins, the fused ones too: many cases of one in one network, and how they are run."""

from dataclasses import dataclass
from pathlib import Path

import nodes
import numpy as np
import onnx
from onnx import compose, helper
from plugins_trt import fused, lowered
from plugins_trt.fused import FusedCase

from dfssm.opset.cases import Case
from dfssm.opset.reference import REFERENCES
from dfssm.runtime.tensorrt import DTYPES
from dfssm.targets import trt
from dfssm.targets.bundle import ENGINE, Manifest
from dfssm.targets.trt_build import Request
from dfssm.targets.trt_child import build_engine


@dataclass(frozen=True)
class Whole(Case):
    """A product of whole numbers: activations that quantise to themselves, scales of 1, a low rank of -1, 0 and 1. fp32
    holds every sum exactly.
    """

    def inputs(self) -> dict[str, np.ndarray]:
        inputs = super().inputs()
        x = np.random.default_rng(0).integers(-127, 128, inputs["x"].shape)
        x[..., 0] = 127
        inputs |= {name: np.ones_like(array) for name, array in inputs.items() if name.endswith("scale")}
        return (
            inputs | {name: np.sign(inputs[name]) for name in ("down", "up") if name in inputs} | {"x": x.astype("f4")}
        )


def whole(case: Case) -> Whole:
    return Whole(case.op, case.sizes, case.attributes, case.kind)


def module(case: Case | FusedCase):
    """Where the case's model and lowered inputs come from."""
    return fused if isinstance(case, FusedCase) else lowered


def feeds(case: Case | FusedCase) -> dict[str, np.ndarray]:
    return lowered.feeds(module(case).lowered_inputs(case))


def outputs(case: Case | FusedCase) -> dict[str, np.ndarray]:
    """What the references make of the case, by the names of the outputs."""
    if isinstance(case, Case):
        return dict(zip(nodes.output_names(case), nodes.expected_outputs(case), strict=True))
    return dict(zip(case.outputs, case.chain(case.inputs(), _reference), strict=True))


def _reference(op: str, inputs: dict, **attributes) -> tuple[np.ndarray, ...]:
    made = REFERENCES[op](**inputs, **attributes)
    return made if isinstance(made, tuple) else (made,)


def network(cases: list[Case | FusedCase]) -> onnx.ModelProto:
    """The cases as TensorRT reads them, side by side: names begin with the case's number, sizes are the case's own."""
    models = []
    for i, case in enumerate(cases):
        model, fed = module(case).node_model(case), feeds(case)
        for value in model.graph.input:
            sizes = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in fed[value.name].shape]
            del value.type.tensor_type.shape.dim[:]
            value.type.tensor_type.shape.dim.extend(sizes)
        models.append(compose.add_prefix(model, f"{i}/"))
    parts = [
        [item for model in models for item in getattr(model.graph, part)]
        for part in ("node", "input", "output", "initializer")
    ]
    graph = helper.make_graph(parts[0], "cases", *parts[1:])
    return helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)


def build(cases: list[Case | FusedCase], builder: str, sm: int, folder: Path) -> Manifest:
    """The engine of `cases` in `folder`, and what `open_engine` asks to know of it."""
    onnx.save(network(cases), folder / "cases.onnx")
    choice = (sm,) if builder == "tensorrt-rtx" else ()
    paths = [str(path) for path in (folder / "cases.onnx", folder / ENGINE, trt.find_library())]
    build_engine(Request(builder, *paths, choice, ((1, 1, 1, 1),)))
    engine = {"builder": builder, "lowering": "plugin", "embed_plugins": False, "version_compatible": False}
    return Manifest("trt", {}, "fp32", 0, {}, engine=engine)


def run(
    engine, cuda, cases: list[Case | FusedCase], prefix: bool = True, in_place: bool = True
) -> list[list[np.ndarray]]:
    """Each case's outputs, in the plugin's order, of one run of the engine on `cuda`. `in_place`: one buffer for a
    state and the new one.
    """
    context = engine.create_execution_context()
    assert context.set_optimization_profile_async(0, cuda.stream)
    addresses, results = {}, []
    for i, case in enumerate(cases):
        names = f"{i}/" if prefix else ""
        for name, array in feeds(case).items():
            addresses[names + name] = cuda.allocate(array.nbytes)
            cuda.to_device(addresses[names + name], np.ascontiguousarray(array))
            cuda.synchronize()
            assert context.set_input_shape(names + name, array.shape)
        results.append({})
        for name, expected in outputs(case).items():
            dtype = np.dtype(DTYPES[engine.get_tensor_dtype(names + name).name])
            result = results[-1][names + name] = np.empty(expected.shape, dtype)
            state = names + name.removeprefix("new_") if in_place else ""
            addresses[names + name] = addresses.get(state) or cuda.allocate(result.nbytes)
    assert len(addresses) == engine.num_io_tensors
    for name, address in addresses.items():
        assert context.set_tensor_address(name, address)
    assert context.execute_async_v3(cuda.stream)
    for made in results:
        for name, array in made.items():
            cuda.to_host(array, addresses[name])
    cuda.synchronize()
    for address in set(addresses.values()):
        cuda.free(address)
    return [list(made.values()) for made in results]
