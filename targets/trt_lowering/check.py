"""What lowering must leave as it was, looked up in what was written: the graph's inputs and outputs, and our nodes."""

import onnx_graphsurgeon as gs

from .graph import ours, raw_bytes


def check_lowered(step: gs.Graph, lowered: gs.Graph, lowering: str) -> None:
    """Raises ValueError, naming it, when something of the step graph is not in the lowered one."""
    for kind in ("inputs", "outputs"):
        before, after = ([(tensor.name, tensor.dtype) for tensor in getattr(graph, kind)] for graph in (step, lowered))
        if before != after:
            raise ValueError(f"the {kind} are {after}, they were {before}")
    found = {node.name: node for node in ours(lowered)}
    if lowering == "native":
        if found:
            raise ValueError(f"{', '.join(found)} still need a plugin")
        return
    for node in ours(step):
        if node.name not in found:
            raise ValueError(f"{node.op} {node.name} is gone")
        _check_node(node, found[node.name])


def _check_node(before: gs.Node, after: gs.Node) -> None:
    if before.op != after.op or not before.attrs.items() <= after.attrs.items():
        raise ValueError(f"{before.name} is {after.op} {after.attrs}, it was {before.op} {before.attrs}")
    for old, new in zip(before.inputs + before.outputs, after.inputs + after.outputs, strict=True):
        if isinstance(old, gs.Constant):
            if old.name != new.name or raw_bytes(old) != raw_bytes(new):
                raise ValueError(f"{before.name} has other bytes for {old.name}")
        elif old.name != new.name:
            raise ValueError(f"{before.name} has {new.name} where it had {old.name}")
