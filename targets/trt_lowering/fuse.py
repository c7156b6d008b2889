"""Chains of nodes that one plugin runs (`dfssm.opset.ops.FUSED`): a launch less for each node that is gone.

    RMSNorm       BinaryScaffoldMatMul  CausalConv1dStep     NormScaffoldConv
    GatedRMSNorm  BinaryScaffoldMatMul  Add                  GatedNormScaffoldAdd

A chain is left as it is when what lies between its nodes is wanted elsewhere. The convolution is the one exception: its
output takes the place of its columns in the product's, so whoever reads that must be able to read columns, and whoever
reads the product must read others.
"""

from math import prod
from typing import Any

import onnx_graphsurgeon as gs

from dfssm.opset import DOMAIN, OPS
from dfssm.opset.ops import FUSED

from .graph import Changes, Refused, ours, take_out, uses

MOST_COLUMNS = 12288
"""A row of the product's input lies in shared memory, in fp32; every GPU has 48 KB a block."""


def run(graph: gs.Graph) -> Changes:
    """Returns the names of the fused nodes: each is called what its product was called. The others are refused."""
    changes = Changes()
    for product in ours(graph, "BinaryScaffoldMatMul"):
        try:
            _fuse(graph, product)
            changes.append(product.name)
        except Refused as why:
            changes.refused[product.name] = str(why)
    return changes


def _fuse(graph: gs.Graph, product: gs.Node) -> None:
    """Fuse `product` with the nodes before and after it; Refused, and nothing changed, where they are no such chain."""
    x, y = product.inputs[0], product.outputs[0]
    norm = x.inputs[0] if x.inputs else None
    if norm is None or not (_is_ours(norm, "RMSNorm") or _is_ours(norm, "GatedRMSNorm")):
        raise Refused(f"its x, {x.name}, comes from {_described(norm)}, not from RMSNorm or GatedRMSNorm")
    _require_one_reader(graph, x)
    (columns,) = norm.inputs[-1].shape
    if columns > MOST_COLUMNS:
        raise Refused(f"{_described(norm)} has {columns} columns, shared memory holds {MOST_COLUMNS}")
    if _is_output(graph, y):
        raise Refused(f"{y.name} is an output of the graph")
    (_norm_scaffold_conv if norm.op == "RMSNorm" else _gated_norm_scaffold_add)(graph, norm, product)


def _norm_scaffold_conv(graph: gs.Graph, norm: gs.Node, product: gs.Node) -> None:
    (y,) = product.outputs
    convolutions = [user for user, index in uses(y) if _is_ours(user, "CausalConv1dStep") and index == 0]
    if len(convolutions) != 1:
        raise Refused(f"{y.name} is convolved by {len(convolutions)} CausalConv1dStep, not by one")
    (conv,) = convolutions
    channels, new_state = conv.outputs
    if _is_output(graph, channels):
        raise Refused(f"{channels.name} is an output of the graph")
    attributes = _attributes("NormScaffoldConv", norm, product, conv)
    start = attributes["x_start"] = max(attributes["x_start"], 0)
    stop = start + conv.inputs[2].shape[0]
    for user, index in uses(y):
        columns = columns_read(user.op, index, user.attrs, user.inputs) if user.domain == DOMAIN else None
        if user is not conv and (columns is None or columns.start < stop and start < columns.stop):
            which = "all columns" if columns is None else f"columns {columns.start} to {columns.stop - 1}"
            raise Refused(f"{_described(user)} reads {which} of {y.name}, of which {start} to {stop - 1} are convolved")
    for user, index in uses(channels):
        if not _start_attribute(user, index):
            raise Refused(f"{_described(user)} reads {channels.name} and has no attribute to read columns by")

    for user, index in uses(channels):
        name = _start_attribute(user, index)
        user.attrs[name] = start + max(user.attrs.get(name, -1), 0)
        user.inputs[index] = y
    _replace(graph, "NormScaffoldConv", (norm, product, conv), attributes, {"y": y, "new_state": new_state})


def _gated_norm_scaffold_add(graph: gs.Graph, norm: gs.Node, product: gs.Node) -> None:
    (y,) = product.outputs
    _require_one_reader(graph, y)
    ((add, index),) = uses(y)
    if add.op != "Add" or add.domain not in (None, ""):
        raise Refused(f"{y.name} is read by {_described(add)}, not by an Add")
    residual = add.inputs[1 - index]
    if list(residual.shape or []) != list(y.shape or []) or residual.dtype != y.dtype:  # broadcast
        raise Refused(
            f"{_described(add)} adds {residual.name} of {residual.dtype}{residual.shape} to {y.dtype}{y.shape}"
        )
    attributes = _attributes("GatedNormScaffoldAdd", norm, product)
    add.inputs = [residual, y]  # as the chain has them
    _replace(graph, "GatedNormScaffoldAdd", (norm, product, add), attributes, {"out": add.outputs[0]})


def _require_one_reader(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Refused unless one node reads `tensor`, once, and nothing else does."""
    if _is_output(graph, tensor):
        raise Refused(f"{tensor.name} is an output of the graph")
    readers = [_described(user) for user, _ in uses(tensor)]
    if len(readers) != 1:
        raise Refused(f"{tensor.name} is read by {' and '.join(readers) or 'nothing'}, not by one node alone")


def _described(node: gs.Node | None) -> str:
    return "nothing" if node is None else f"{node.op} {node.name}"


def _attributes(fused: str, *nodes: gs.Node) -> dict[str, Any]:
    """What the nodes say of the attributes that `fused` has."""
    said = {name: value for node in nodes for name, value in (OPS[node.op].defaults | node.attrs).items()}
    return {name: said[name] for name in FUSED[fused].defaults}


def _replace(
    graph: gs.Graph, op: str, chain: tuple[gs.Node, ...], attributes: dict[str, Any], outputs: dict[str, gs.Tensor]
) -> None:
    """Put a node of `op`, which has the steps of `chain`, in the place of their product, and take out the others."""
    tensors: dict[str, gs.Tensor] = {}
    for step, node in zip(FUSED[op].steps, chain, strict=True):
        tensors |= dict(zip(step.inputs.split(), node.inputs, strict=True))
    inputs = [tensors[spec.name] for spec in FUSED[op].inputs]
    product = chain[1]
    for node in chain:
        take_out(node)
    place = next(i for i, node in enumerate(graph.nodes) if node is product)
    made = [outputs[spec.name] for spec in FUSED[op].outputs]
    graph.nodes[place] = gs.Node(op, product.name, attributes, inputs, made, domain=DOMAIN)


def _is_ours(node: gs.Node, op: str) -> bool:
    return bool(node.domain == DOMAIN and node.op == op)


def _is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(output is tensor for output in graph.outputs)


def _start_attribute(node: gs.Node, index: int) -> str | None:
    """The attribute with the first column that `node` reads of this input; None where it reads tensors only."""
    return OPS[node.op].inputs[index].start if node.domain == DOMAIN and node.op in OPS else None


def columns_read(op: str, index: int, attributes: dict[str, Any], inputs: list[gs.Tensor]) -> range | None:
    """The columns that a node of ours reads of its input `index`; None for all of them."""
    spec = OPS[op].inputs[index] if op in OPS else None
    if spec is None or spec.start is None or attributes.get(spec.start, -1) < 0:
        return None
    sizes = OPS[op].defaults | attributes
    for other, tensor in zip(OPS[op].inputs, inputs, strict=False):
        if not other.start:
            sizes |= dict(zip(map(str, other.shape), tensor.shape, strict=True))
    start = attributes[spec.start]
    return range(start, start + prod(sizes[factor] for factor in spec.shape[-1].factors))
