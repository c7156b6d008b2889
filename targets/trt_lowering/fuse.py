"""Chains of nodes that one plugin runs (`trt_plugins.FUSED`): a launch less for each node that is gone.

    RMSNorm       BinaryScaffoldMatMul  CausalConv1dStep     NormScaffoldConv
    GatedRMSNorm  BinaryScaffoldMatMul  Add                  GatedNormScaffoldAdd

A chain is left as it is when what lies between its nodes is wanted elsewhere. The convolution is the one exception: its
output takes the place of its columns in the product's, so whoever reads that must be able to read columns, and whoever
reads the product must read others.
"""

from math import prod

import onnx_graphsurgeon as gs

from dfssm.opset import DOMAIN, OPS
from dfssm.targets.trt_plugins import FUSED

from .graph import ours, take_out

MOST_COLUMNS = 12288
"""A row of the product's input lies in shared memory, in fp32; every GPU has 48 KB a block."""


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the fused nodes: each is called what its product was called."""
    changed = []
    for product in ours(graph, "BinaryScaffoldMatMul"):
        if _norm_scaffold_conv(graph, product) or _gated_norm_scaffold_add(graph, product):
            changed.append(product.name)
    return changed


def _norm_scaffold_conv(graph: gs.Graph, product: gs.Node) -> bool:
    norm, (y,) = _normed(graph, product, "RMSNorm"), product.outputs
    convolutions = [user for user, index in _uses(y) if _is_ours(user, "CausalConv1dStep") and index == 0]
    if norm is None or len(convolutions) != 1 or _is_output(graph, y):
        return False
    (conv,) = convolutions
    channels, new_state = conv.outputs
    if _is_output(graph, channels):
        return False
    attributes = _attributes("NormScaffoldConv", norm, product, conv)
    start = attributes["x_start"] = max(attributes["x_start"], 0)
    width = conv.inputs[2].shape[0]
    others = [_columns(user, index) for user, index in _uses(y) if user is not conv]
    if not all(columns and (columns.stop <= start or start + width <= columns.start) for columns in others):
        return False
    if not all(_start_attribute(user, index) for user, index in _uses(channels)):
        return False

    for user, index in _uses(channels):
        name = _start_attribute(user, index)
        user.attrs[name] = start + max(user.attrs.get(name, -1), 0)
        user.inputs[index] = y
    inputs = [*norm.inputs, *product.inputs[1:], *conv.inputs[1:]]
    _replace(graph, product, "NormScaffoldConv", (norm, conv), attributes, inputs, [y, new_state])
    return True


def _gated_norm_scaffold_add(graph: gs.Graph, product: gs.Node) -> bool:
    norm, (y,) = _normed(graph, product, "GatedRMSNorm"), product.outputs
    uses = _uses(y)
    if norm is None or len(uses) != 1 or _is_output(graph, y):
        return False
    ((add, index),) = uses
    if add.op != "Add" or add.domain not in (None, ""):
        return False
    residual = add.inputs[1 - index]
    if list(residual.shape or []) != list(y.shape or []) or residual.dtype != y.dtype:  # broadcast
        return False
    attributes = _attributes("GatedNormScaffoldAdd", norm, product)
    inputs = [*norm.inputs, *product.inputs[1:], residual]
    _replace(graph, product, "GatedNormScaffoldAdd", (norm, add), attributes, inputs, list(add.outputs))
    return True


def _normed(graph: gs.Graph, product: gs.Node, op: str) -> gs.Node | None:
    """The norm `op` that feeds `product` and nothing else."""
    x = product.inputs[0]
    norm = x.inputs[0] if x.inputs else None
    if norm is None or not _is_ours(norm, op) or len(_uses(x)) != 1 or _is_output(graph, x):
        return None
    (columns,) = norm.inputs[-1].shape
    return norm if columns <= MOST_COLUMNS else None


def _attributes(fused: str, *nodes: gs.Node) -> dict:
    """What the nodes say of the attributes that `fused` has."""
    said = {name: value for node in nodes for name, value in (OPS[node.op].defaults | node.attrs).items()}
    return {name: said[name] for name in FUSED[fused].defaults}


def _replace(graph: gs.Graph, product: gs.Node, op: str, others: tuple, attributes: dict, inputs, outputs) -> None:
    """Put a node of `op` in the place of `product`, and take out the `others` of its chain."""
    for node in (product, *others):
        take_out(node)
    place = next(i for i, node in enumerate(graph.nodes) if node is product)
    graph.nodes[place] = gs.Node(op, product.name, attributes, inputs, outputs, domain=DOMAIN)


def _is_ours(node: gs.Node, op: str) -> bool:
    return node.domain == DOMAIN and node.op == op


def _is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(output is tensor for output in graph.outputs)


def _uses(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """Each node that reads `tensor`, and as which of its inputs."""
    users = {id(node): node for node in tensor.outputs}.values()
    return [(node, index) for node in users for index, value in enumerate(node.inputs) if value is tensor]


def _start_attribute(node: gs.Node, index: int) -> str | None:
    """The attribute with the first column that `node` reads of this input; None where it reads tensors only."""
    if node.domain != DOMAIN or node.op not in OPS:
        return None
    return OPS[node.op].inputs[index].start


def _columns(node: gs.Node, index: int) -> range | None:
    """The columns that `node` reads of this input; None for all of them."""
    name = _start_attribute(node, index)
    if name is None or node.attrs.get(name, -1) < 0:
        return None
    op = OPS[node.op]
    sizes = op.defaults | node.attrs
    for spec, tensor in zip(op.inputs, node.inputs, strict=False):
        if not spec.start:
            sizes |= dict(zip(spec.shape, tensor.shape, strict=True))
    start = node.attrs[name]
    return range(start, start + prod(sizes[factor] for factor in op.inputs[index].shape[-1].split(" * ")))
