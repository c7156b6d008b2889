"""What the passes share: reading and writing a graph without its weights, finding things in it, adding nodes to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from dfssm.opset import DOMAIN

NATIVE_DATA = "native.data"
"""Data file of the weights that the pass `native` stores anew."""


class Refused(Exception):
    """Why a pass leaves a node as it is: in one line, with the value that is in the way."""


class Changes(list[str]):
    """What a pass changed, by name. `refused`: node that it is for, but left as it was -> why."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}


class Stored(LazyValues):
    """Values that lie in a data file beside the graph: mapped when they are read, never held."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path):
        super().__init__(tensor)
        self.folder = folder

    def load(self) -> np.ndarray:
        """The values, mapped from the file. The dtype must be one of NumPy's own."""
        return self.raw().view(self.dtype).reshape(self.shape)

    def raw(self) -> np.ndarray:
        """The bytes, mapped from the file."""
        where = {entry.key: entry.value for entry in self.tensor.external_data}
        offset, length = int(where["offset"]), int(where["length"])
        return np.memmap(self.folder / where["location"], np.uint8, "r", offset, (length,))


def load(path: Path) -> gs.Graph:
    """The graph in `path`; weights in an external data file stay there."""
    graph = gs.import_onnx(onnx.load(path, load_external_data=False))
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and (stored := proto(tensor)) and stored.external_data:
            tensor.values = Stored(stored, path.parent)
    return graph


def save(graph: gs.Graph, path: Path) -> None:
    """Write `graph`; weights in data files are named, not written again."""
    onnx.save(gs.export_onnx(graph.cleanup().toposort()), path)


def ours(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """The nodes of our domain, all or of the named ops, in order."""
    return (node for node in list(graph.nodes) if node.domain == DOMAIN and (not ops or node.op in ops))


def uses(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """Each node that reads `tensor`, and as which of its inputs."""
    users = {id(node): node for node in tensor.outputs}.values()
    return [(node, index) for node in users for index, value in enumerate(node.inputs) if value is tensor]


def node_named(graph: gs.Graph, name: str) -> gs.Node | None:
    """The node called `name`, if there is one."""
    return next((node for node in graph.nodes if node.name == name), None)


def proto(constant: gs.Constant) -> onnx.TensorProto | None:
    """The tensor in the file behind `constant`; None once its values are in memory."""
    values = constant._values  # graphsurgeon's `values` would read it, and cannot read external data
    return values.tensor if isinstance(values, LazyValues) else None


def view(constant: gs.Constant, dtype: int, shape: list[int]) -> None:
    """Declare the bytes of `constant` to be of another ONNX dtype and shape of the same size."""
    tensor = onnx.TensorProto()
    tensor.CopyFrom(proto(constant))
    tensor.data_type = dtype
    tensor.dims[:] = shape
    stored = constant._values
    constant.values = Stored(tensor, stored.folder) if isinstance(stored, Stored) else LazyValues(tensor)


def read(constant: gs.Constant) -> np.ndarray:
    """The values of `constant`, without keeping them in memory as graphsurgeon's `values` does."""
    values: np.ndarray = constant._values.load() if isinstance(constant._values, LazyValues) else constant._values
    return values


def raw_bytes(constant: gs.Constant) -> memoryview:
    """The bytes of `constant` as they lie in its file."""
    if isinstance(constant._values, Stored):
        return constant._values.raw().data
    return memoryview(read(constant).tobytes())


def store(name: str, payload: bytes | memoryview, dtype: int, shape: list[int], beside: gs.Constant) -> gs.Constant:
    """A constant of these bytes, appended to the data file NATIVE_DATA if `beside` lies in one, else in the graph."""
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape)
    if not isinstance(beside._values, Stored):
        tensor.raw_data = bytes(payload)
        return gs.Constant(name, LazyValues(tensor))
    folder = beside._values.folder
    with open(folder / NATIVE_DATA, "ab") as data:
        entry = {"location": NATIVE_DATA, "offset": data.tell(), "length": memoryview(payload).nbytes}
        data.write(payload)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entry.items():
        tensor.external_data.add(key=key, value=str(value))
    return gs.Constant(name, Stored(tensor, folder))


class Emitter:
    """Adds nodes to a graph under one prefix. A call makes a node and returns its output:

        emit("Mul", x, 2.0)      emit("Cast", x, to=FLOAT)      emit("Add", x, y, out=variable)

    Inputs are tensors, or numbers and arrays, which become constants: float is fp32, int and a list of them int64.
    What a tensor's dtype and shape are is left to the pass `dtypes`.
    """

    def __init__(self, graph: gs.Graph, prefix: str, constants: dict[str, gs.Constant] | None = None):
        self.graph, self.prefix = graph, prefix
        self._count = 0
        self._constants = {} if constants is None else constants

    def __call__(self, op: str, *inputs: Any, out: gs.Variable | None = None, **attributes: Any) -> gs.Variable:
        self._count += 1
        name = f"{self.prefix}/{op}_{self._count}"
        out = gs.Variable(f"{name}/out") if out is None else out
        tensors = [self._tensor(value, f"{name}/{i}") for i, value in enumerate(inputs)]
        self.graph.nodes.append(gs.Node(op, name, attributes, tensors, [out]))
        return out

    def shared(self, name: str, values: np.ndarray) -> gs.Constant:
        """The one constant of that name and shape, for all emitters with the same `constants`."""
        name = f"{name}.{'x'.join(map(str, values.shape))}"
        return self._constants.setdefault(name, gs.Constant(name, values))

    def _tensor(self, value: Any, name: str) -> gs.Tensor:
        if isinstance(value, gs.Tensor):
            return value
        if isinstance(value, float):
            value = np.float32(value)
        return gs.Constant(name, np.array(value))


def take_out(node: gs.Node) -> list[gs.Variable]:
    """Take `node` out of its graph; its outputs, which then nothing produces, are for what takes its place."""
    outputs = list(node.outputs)
    node.outputs.clear()
    node.inputs.clear()
    return outputs
