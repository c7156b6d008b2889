"""The nodes of one layer of a bundle's graph, to be shown. The file may be anybody's: it is parsed in a process of its
own, and what is said of it is bounded.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dfssm.base import DfssmError
from dfssm.base.child import Child, ChildError
from dfssm.base.reading import read_file
from dfssm.opset import DOMAIN
from dfssm.targets.bundle import MODEL, Bundle

NODES, TEXT = 64, 100
"""At most so many nodes of a layer, inputs or outputs of a node, and characters of a name."""

_LISTS = ("weights", "states", "new_states")  # of values, in a Node


@dataclass(frozen=True)
class Value:
    """A tensor: its name, its dtype as ONNX names it, its shape; a name in this stands for a size that is not fixed."""

    name: str
    dtype: str = ""
    shape: list[int | str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]" if self.dtype else ""


@dataclass(frozen=True)
class Node:
    """`ours`: an op of ai.dfssm. `sources`: the places in the layer of the nodes that it reads from, -1 for what comes
    from outside of it. `weights` are initializers, `states` inputs and `new_states` outputs of the graph. `output`:
    what other nodes read.
    """

    name: str
    op: str
    ours: bool
    sources: list[int]
    weights: list[Value]
    states: list[Value]
    new_states: list[Value]
    output: Value

    @property
    def short_name(self) -> str:
        """Its name in the layer."""
        return self.name.split("/", 2)[-1]


def layer_nodes(bundle: Bundle, layer: int) -> list[Node]:
    """The nodes of a layer of `bundle`, whose files have been checked, in the order in which they run.

    Raises DfssmError where its model.onnx is no graph, or has no such layer.
    """
    sha256 = bundle.manifest.files[MODEL]["sha256"]

    def ask(path: Path) -> list[dict[str, Any]]:
        with Child(__name__, "read_layer") as child:
            try:
                found: list[dict[str, Any]] = child.ask([str(path), sha256, layer])
            except ChildError as error:
                raise DfssmError(f"{path} cannot be shown ({error}): compile the model again") from None
        return found

    return [_node(node) for node in bundle.by_path(MODEL, ask)]


def _node(found: dict[str, Any]) -> Node:
    lists = {key: [Value(**one) for one in found[key]] for key in _LISTS}
    return Node(**found | lists | {"output": Value(**found["output"])})


def read_layer(request: list[Any]) -> list[dict[str, Any]]:
    """In the other process: `layer_nodes` as what JSON holds."""
    import onnx

    path, sha256, layer = request
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("it has changed since it was checked")
    graph = onnx.ModelProto.FromString(content).graph
    nodes = [node for node in graph.node if node.name.startswith(f"/layers.{layer}/")]
    if not 1 <= len(nodes) <= NODES:
        raise ValueError(f"it has {len(nodes)} nodes of layer {layer}, 1 to {NODES} can be shown")
    made = {name: place for place, node in enumerate(nodes) for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    inputs, outputs = ({value.name for value in of} for of in (graph.input, graph.output))

    def dtype(number: int) -> str:
        known = number in onnx.TensorProto.DataType.values()
        return onnx.TensorProto.DataType.Name(number).lower() if known else str(number)

    def value(name: str) -> Value:
        if name in weights:
            return Value(name[:TEXT], dtype(weights[name].data_type), list(weights[name].dims)[:8])
        if name not in values:
            return Value(name[:TEXT])
        of = values[name].type.tensor_type
        dims = [dim.dim_param[:TEXT] or dim.dim_value for dim in of.shape.dim[:8]]
        return Value(name[:TEXT], dtype(of.elem_type), dims)

    found = []
    for node in nodes:
        read = [name for name in dict.fromkeys(node.input[:NODES]) if name]
        others = [name for name in read if name not in weights and name not in inputs]
        new_states = [name for name in node.output[:NODES] if name in outputs]
        passed_on = [name for name in node.output[:NODES] if name not in outputs]
        found.append(
            Node(
                node.name[:TEXT],
                node.op_type[:TEXT],
                node.domain == DOMAIN,
                sorted({made.get(name, -1) for name in others}),
                [value(name) for name in read if name in weights],
                [value(name) for name in read if name in inputs and name not in weights],
                [value(name) for name in new_states],
                value((passed_on or [""])[0]),
            )
        )
    return [asdict(node) for node in found]
