"""What lowering must leave as it was, looked up in what was written: the graph's inputs and outputs, and our nodes.

A fused node is taken apart first, into the chain that its op says it is (dfssm.opset.fusion). Then every node of ours
in the step graph must be there, with its attributes, inputs and weights, and nothing besides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from dfssm.base import DfssmError
from dfssm.opset import DOMAIN
from dfssm.opset.fusion import FusedOp
from dfssm.opset.ops import FUSED, OPS
from dfssm.targets.trt_build import LOGITS_AT
from dfssm.targets.trt_plugins import PLUGINS

from .fuse import columns_read
from .graph import ours, raw_bytes, uses


@dataclass
class Call:
    """A node, or one that a fused node stands for: then its tensors are those of its inputs, and made-up ones."""

    op: str
    name: str
    attributes: dict[str, Any]
    inputs: list[gs.Tensor]
    outputs: list[gs.Tensor]
    fused: str = ""
    """The fused op that it is a part of."""
    relative: set[str] = field(default_factory=set)
    """The starts for which -1, the whole tensor, is as good as 0: lowering has looked at the widths."""

    @property
    def key(self) -> tuple[str, str]:
        """What it is found by: its first weight; its output where it has none."""
        weights = [tensor.name for tensor in self.inputs if isinstance(tensor, gs.Constant)]
        return self.op, weights[0] if weights else self.outputs[0].name

    def __str__(self) -> str:
        return f"{self.op} of {self.fused} {self.name}" if self.fused else f"{self.op} {self.name}"


def check_lowered(step: gs.Graph, lowered: gs.Graph, lowering: str) -> None:
    """Raises ValueError, naming it, when something of the step graph is not in the lowered one."""
    for kind in ("inputs", "outputs"):
        was, now = (
            [(tensor.name, tensor.dtype) for tensor in getattr(graph, kind) if tensor.name != LOGITS_AT]
            for graph in (step, lowered)
        )
        if was != now:
            raise ValueError(f"the {kind} are {now}, they were {was}")
    given = {tensor.name for tensor in lowered.inputs}
    for tensor in lowered.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.outputs and not tensor.inputs and tensor.name not in given:
            raise ValueError(f"{tensor.outputs[0].name} reads {tensor.name}, which nothing makes")
    if lowering == "native":
        if names := [node.name for node in ours(lowered)]:
            raise ValueError(f"{', '.join(names)} still need a plugin")
        return
    found = {call.key: call for call in inlined(lowered)}
    became: dict[str, str] = {}  # a tensor of the step graph -> what it is called in the inlined one
    for node in step.nodes:
        before = Call(node.op, node.name, node.attrs, list(node.inputs), list(node.outputs))
        call = found.pop(before.key, None) or _named(before, found)
        if call is None:
            if node.domain == DOMAIN:
                raise ValueError(f"{before} is gone")
            continue
        _check_call(before, call, became)
        became |= {old.name: new.name for old, new in zip(before.outputs, call.outputs, strict=True)}
    for call in found.values():
        raise ValueError(f"{call} was not there")


def check_in_place(lowered: gs.Graph) -> None:
    """DfssmError, naming it, where a state may not be written in the buffer that it is read from. TensorRT knows
    nothing of that, so one node of ours must be alone in reading the state, and make the new one of it.
    """
    made_of: dict[str, tuple[gs.Node, int]] = {}
    for node in ours(lowered):
        specs = PLUGINS[node.op]
        inputs = [spec.name for spec in specs.inputs]
        for spec, tensor in zip(specs.outputs, node.outputs, strict=False):
            if spec.over:
                made_of[tensor.name] = node, inputs.index(spec.over)
    for state in lowered.inputs:
        if "." not in state.name:
            continue
        readers = uses(state)
        maker = made_of.get(state.name.replace(".", "_out."))
        if maker is None or readers != [maker]:
            read_by = " and ".join(f"{node.op} {node.name}" for node, _ in readers) or "nothing"
            makes = f"{maker[0].op} {maker[0].name}" if maker else "no plugin"
            raise DfssmError(
                f"{state.name} cannot be updated in place: {read_by} reads it, {makes} makes the new one; "
                "compile with --lowering native"
            )


def _named(before: Call, found: dict[tuple[str, str], Call]) -> Call | None:
    """The call of that op and name, which has another first weight: what is wrong with it is to be said."""
    return next((c for c in found.values() if not c.fused and (c.op, c.name) == (before.op, before.name)), None)


def inlined(graph: gs.Graph) -> Iterator[Call]:
    """Our nodes, fused ones taken apart. A tensor with columns put in place is again the two that it is made of."""
    spliced: dict[str, tuple[gs.Tensor, gs.Tensor, range]] = {}
    calls: list[Call] = []
    for node in graph.nodes:
        if node.domain == DOMAIN and node.op in FUSED:
            calls += _chain(node, FUSED[node.op], spliced)
        elif node.domain == DOMAIN:
            calls.append(Call(node.op, node.name, dict(node.attrs), list(node.inputs), list(node.outputs)))
        elif moved := [tensor.name for tensor in node.inputs if tensor.name in spliced]:
            raise ValueError(
                f"{node.op} {node.name} reads all of {moved[0]}, some columns of which are another tensor's"
            )
    for call in calls:
        for index, tensor in enumerate(call.inputs):
            if tensor.name in spliced:
                _redirect(call, index, *spliced[tensor.name])
    return iter(calls)


def _chain(node: gs.Node, op: FusedOp, spliced: dict[str, tuple[gs.Tensor, gs.Tensor, range]]) -> Iterator[Call]:
    """The calls that `node` stands for; adds to `spliced` its output that is made of two tensors."""
    if (len(node.inputs), len(node.outputs)) != (len(op.inputs), len(op.outputs)):
        raise ValueError(f"{node.op} {node.name} has {len(node.inputs)} inputs, expected {len(op.inputs)}")
    values = dict(zip((t.name for t in op.inputs), node.inputs, strict=True))
    made = dict(zip((t.name for t in op.outputs), node.outputs, strict=True))
    attributes = {name: node.attrs.get(name, default) for name, default in op.defaults.items()}
    for part in op.steps:
        outputs = [made.get(name) or gs.Variable(f"{node.name}:{name}") for name in part.outputs.split()]
        values |= dict(zip(part.outputs.split(), outputs, strict=True))
        own = {name: attributes[name] for name in part.attributes}
        inputs = [values[name] for name in part.inputs.split()]
        relative = {op.splice.start} & own.keys() if op.splice else set()
        yield Call(part.op.name, node.name, own, inputs, outputs, node.op, relative)
    if op.splice:
        start, width = attributes[op.splice.start], values["conv_weight"].shape[0]
        out = made[op.splice.out].name
        spliced[out] = values[op.splice.base], values[op.splice.part], range(start, start + width)


def _redirect(call: Call, index: int, base: gs.Tensor, part: gs.Tensor, columns: range) -> None:
    """Input `index` is `base` with `columns` replaced by `part`: let `call` read the one that has what it reads."""
    read = columns_read(call.op, index, call.attributes, call.inputs)
    if read is None or (read.start < columns.stop and columns.start < read.stop and not _within(read, columns)):
        which = f"columns {read.start} to {read.stop - 1}" if read else "all columns"
        another = f"{columns.start} to {columns.stop - 1} of which are {part.name}"
        raise ValueError(f"{call} reads {which} of {call.inputs[index].name}, {another}")
    call.inputs[index] = base
    if _within(read, columns):
        start = str(OPS[call.op].inputs[index].start)
        call.inputs[index] = part
        call.attributes[start] = read.start - columns.start
        call.relative.add(start)


def _within(read: range, columns: range) -> bool:
    return columns.start <= read.start and read.stop <= columns.stop


def _check_call(before: Call, after: Call, became: dict[str, str]) -> None:
    named = not after.fused or before.op == "BinaryScaffoldMatMul"  # which gives a fused node its name
    if named and before.name != after.name:
        raise ValueError(f"{before} is {after} now")
    if before.op in OPS:
        wanted, got = ({name: _start(call, name, default, after.relative) for name, default in
                        OPS[before.op].defaults.items()} for call in (before, after))  # fmt: skip
        if wanted != got:
            raise ValueError(f"{after} has {got}, it should have {wanted}")
    inputs = [(old, became.get(old.name, old.name)) for old in before.inputs]
    actual = list(after.inputs)
    if before.op == "Add":  # in any order
        inputs.sort(key=lambda pair: pair[1])
        actual.sort(key=lambda tensor: str(tensor.name))
    for (old, name), new in zip(inputs, actual, strict=True):
        if name != new.name:
            raise ValueError(f"{after} reads {new.name} where it read {old.name}")
        if isinstance(old, gs.Constant) and raw_bytes(old) != raw_bytes(new):
            raise ValueError(f"{after} has other bytes for {old.name}")
    for old, new in zip(before.outputs, after.outputs, strict=True):
        if old.name != new.name and ":" not in new.name:
            raise ValueError(f"{after} makes {new.name} where it made {old.name}")


def _start(call: Call, name: str, default: Any, relative: set[str]) -> Any:
    value = call.attributes.get(name, default)
    return max(value, 0) if name in relative else value
