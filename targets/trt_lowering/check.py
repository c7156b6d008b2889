"""What lowering must leave as it was, looked up in what was written: the graph's inputs and outputs, and our nodes."""

from typing import Any

import onnx_graphsurgeon as gs

from dfssm.opset import OPS
from dfssm.targets.trt_plugins import FUSED

from .graph import node_named, ours, raw_bytes

Moved = dict[str, tuple[str, int]]
"""A tensor of the step graph that became columns of another -> (that one, the first column)."""


def check_lowered(step: gs.Graph, lowered: gs.Graph, lowering: str) -> None:
    """Raises ValueError, naming it, when something of the step graph is not in the lowered one."""
    for kind in ("inputs", "outputs"):
        before, after = ([(tensor.name, tensor.dtype) for tensor in getattr(graph, kind)] for graph in (step, lowered))
        if before != after:
            raise ValueError(f"the {kind} are {after}, they were {before}")
    given = {tensor.name for tensor in lowered.inputs}
    for tensor in lowered.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.outputs and not tensor.inputs and tensor.name not in given:
            raise ValueError(f"{tensor.outputs[0].name} reads {tensor.name}, which nothing makes")
    found = {node.name: node for node in ours(lowered)}
    if lowering == "native":
        if found:
            raise ValueError(f"{', '.join(found)} still need a plugin")
        return
    parts: set[str] = set()
    moved: Moved = {}
    for node in ours(lowered, *FUSED):
        _check_fused(step, node, parts, moved)
    for node in ours(step):
        if node.name in parts:
            continue
        if node.name not in found:
            raise ValueError(f"{node.op} {node.name} is gone")
        _check_node(node, found[node.name], moved)


def _check_fused(step: gs.Graph, node: gs.Node, parts: set[str], moved: Moved) -> None:
    """`node` against the chain of the step graph around the product of its name. Adds to `parts` the nodes of that, and
    to `moved` the tensor that lies in another now.
    """
    product = node_named(step, node.name)
    if product is None or product.op != "BinaryScaffoldMatMul":
        raise ValueError(f"{node.op} {node.name} has no product of that name")
    (norm,) = product.inputs[0].inputs
    (y,) = product.outputs
    inputs = [*norm.inputs, *product.inputs[1:]]
    attributes = norm.attrs | product.attrs
    if node.op == "NormScaffoldConv":
        last = next((user for user in y.outputs if user.op == "CausalConv1dStep"), None)
        first = "RMSNorm"
    else:
        last = y.outputs[0] if y.outputs[0].op == "Add" else None
        first = "GatedRMSNorm"
    if norm.op != first or last is None:
        raise ValueError(f"{node.op} {node.name} was no such chain")
    outputs = last.outputs
    if node.op == "NormScaffoldConv":
        inputs += last.inputs[1:]
        outputs = [y, last.outputs[1]]
        start = max((OPS[last.op].defaults | last.attrs)["x_start"], 0)
        attributes |= last.attrs | {"x_start": start}
        moved[last.outputs[0].name] = (y.name, start)
    else:
        inputs += [tensor for tensor in last.inputs if tensor is not y]
    parts |= {norm.name, product.name, last.name}
    _check_attributes(node, attributes)
    _check_tensors(node, inputs + list(outputs))


def _check_node(before: gs.Node, after: gs.Node, moved: Moved) -> None:
    attributes = dict(before.attrs)
    expected = list(before.inputs + before.outputs)
    for index, (spec, tensor) in enumerate(zip(OPS[before.op].inputs, before.inputs, strict=False)):
        if tensor.name in moved:
            into, start = moved[tensor.name]
            attributes[spec.start] = start + max(before.attrs.get(spec.start, -1), 0)
            expected[index] = gs.Variable(into)
    if before.op != after.op:
        raise ValueError(f"{before.name} is {after.op}, it was {before.op}")
    _check_attributes(after, attributes)
    _check_tensors(after, expected)


def _check_attributes(node: gs.Node, wanted: dict[str, Any]) -> None:
    if not wanted.items() <= node.attrs.items():
        raise ValueError(f"{node.name} is {node.op} {node.attrs}, it should be {wanted}")


def _check_tensors(node: gs.Node, wanted: list[gs.Tensor]) -> None:
    for old, new in zip(wanted, node.inputs + node.outputs, strict=True):
        if isinstance(old, gs.Constant):
            if old.name != new.name or raw_bytes(old) != raw_bytes(new):
                raise ValueError(f"{node.name} has other bytes for {old.name}")
        elif old.name != new.name:
            raise ValueError(f"{node.name} has {new.name} where it had {old.name}")
